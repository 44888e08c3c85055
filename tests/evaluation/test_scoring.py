"""Every reward function on every completion: shapes, weights, and functions that are broken."""

import math
from types import SimpleNamespace

import pytest
import torch
from toys import written

from evaluation.scoring import Rewards, score, with_overlong_penalty
from evaluator import REWARD_FUNCTIONS
from rldatasets import Problem
from utils import UserError

GOLD = Problem("How many?", "72", "")


def rollouts_of(*texts):
    return SimpleNamespace(texts=list(texts))


def test_scores_keep_the_group_as_an_axis_and_weights_enter_the_total_alone():
    rollouts = rollouts_of([written(), "72"], [written("5"), written("73")])
    problems = [GOLD, Problem("?", "5", "")]
    rewards = score(rollouts, problems, REWARD_FUNCTIONS, {"correctness": 3.0, "tag_count": 0.0})
    assert rewards.names == [function.__name__ for function in REWARD_FUNCTIONS]
    assert rewards.per_function.shape == (2, 2, 5)
    assert rewards.per_function[..., 0].tolist() == [[2.0, 0.0], [2.0, 0.0]]
    assert rewards.total.tolist() == [[7.5, 0.0], [7.5, 1.5]]


def broken(kind):
    def picky(completion, problem):
        if kind == "raises":
            return {}["no such key"]
        return {"None": None, "NaN": math.nan, "text": "2.0", "infinite": math.inf}[kind]

    return picky


@pytest.mark.parametrize("kind", ["raises", "None", "NaN", "text", "infinite"])
def test_a_broken_reward_function_is_named_with_its_question_and_file(kind):
    with pytest.raises(UserError) as raised:
        score(rollouts_of(["text"]), [GOLD], [broken(kind)], file="completions/step_00007.jsonl")
    message = str(raised.value)
    for part in ("picky", "How many?", "'text'", "completions/step_00007.jsonl"):
        assert part in message
    assert "\n" not in message


def test_the_penalty_is_a_reward_of_its_own_and_off_by_default():
    rewards = Rewards(["ok"], torch.tensor([[[1.0], [1.0]]]), torch.tensor([[2.0, 2.0]]),
                      torch.tensor([2.0]))  # fmt: skip
    mask = torch.arange(10) < torch.tensor([[[10], [7]]])
    rollouts = SimpleNamespace(completion_mask=mask)
    args = SimpleNamespace(overlong_buffer=0, max_completion_length=10)
    assert with_overlong_penalty(rewards, rollouts, args) is rewards
    args.overlong_buffer = 4
    penalised = with_overlong_penalty(rewards, rollouts, args)
    assert penalised.names == ["ok", "overlong"]
    assert penalised.per_function.tolist() == [[[1.0, -1.0], [1.0, -0.25]]]
    assert penalised.total.tolist() == [[1.0, 1.75]]
