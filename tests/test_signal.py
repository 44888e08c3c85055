"""Rewards that rounding alone tells apart are equal; whatever differs more is signal."""

import itertools

import pytest
import torch

from evaluation.scoring import score
from grpo import group_advantages, has_signal, overlong_penalty
from rldatasets import Problem

# (rewards that are equal on paper, in every order of adding)
EQUAL = [
    [0.8 + 0.1, 0.9], [0.1 + 0.2 + 0.3, 0.3 + 0.2 + 0.1, 0.6], [1.1 + 2.2, 3.3],
    [sum([0.1] * 10), 1.0], [1e6 * 0.8 + 1e6 * 0.1, 9e5], [-0.7 - 0.1, -0.8], [1e39 * 0.3, 3e38],
    [0.7] * 7, [0.0, -0.0], [1e-20 / 3 * 3, 1e-20],
]  # fmt: skip
UNEQUAL = [
    [1.0, 1.0 + 1e-6], [0.0, 1e-30], [2.0, 2.125], [1e39, 1.001e39], [-1.0, 1.0],
    [1000, 1000.00001], [0.9, 0.9 + 1e-6, 0.9],
]  # fmt: skip


@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("values", EQUAL, ids=str)
def test_sums_in_any_order_have_an_advantage_of_exactly_0(values, scale, baseline):
    for order in itertools.islice(itertools.permutations(values), 6):
        rewards = torch.tensor([order], dtype=torch.float64)
        assert has_signal(rewards).tolist() == [False]
        assert (group_advantages(rewards, scale, baseline=baseline) == 0).all()


@pytest.mark.parametrize("values", UNEQUAL, ids=str)
def test_a_real_difference_is_signal_however_small(values):
    rewards = torch.tensor([values], dtype=torch.float64)
    assert has_signal(rewards).tolist() == [True]
    advantages = group_advantages(rewards)[0]
    assert advantages.argmax() == rewards[0].argmax() and advantages.max() > 0 > advantages.min()


def test_only_the_chosen_completions_decide():
    rewards = torch.tensor([[0.9, 0.8 + 0.1, 5.0]] * 3, dtype=torch.float64)
    chosen = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])
    assert has_signal(rewards, chosen).tolist() == [False, True, False]
    advantages = group_advantages(rewards, chosen=chosen)
    assert (advantages[[0, 2]] == 0).all() and advantages[1, 2] > 0


def test_rewards_of_fp32_keep_their_dtype():
    assert group_advantages(torch.tensor([[0.0, 1.0]])).dtype == torch.float32


def test_a_penalty_for_length_is_as_exact_as_the_other_rewards():
    [penalty] = overlong_penalty(torch.tensor([97]), 100, 30).tolist()
    assert penalty == -27 / 30


def test_a_weight_of_a_million_makes_no_signal_of_rounding():
    def left(completion, problem):
        return {"a": 0.8, "b": 0.9}[completion]

    def right(completion, problem):
        return {"a": 0.1, "b": 0.0}[completion]

    class Rollouts:
        texts = (("a", "b", "a"),)

    weights = {"left": 1e6, "right": 1e6}
    rewards = score(Rollouts, [Problem("", "", "")], [left, right], weights)
    assert rewards.total.dtype == torch.float64
    assert (group_advantages(rewards.total, "none") == 0).all()
