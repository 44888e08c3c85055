"""Every scale of advantages against plain Python, by hand, and against TRL's own lines."""

import inspect
import math
import runpy
import textwrap
from statistics import fmean, stdev
from types import SimpleNamespace

import pytest
import torch

from evaluation.scoring import Rewards, advantages_of, joined_rewards, with_overlong_penalty
from grpo import decoupled_advantages, group_advantages


def rewards_and_chosen(seed, questions=4, group_size=5):
    generator = torch.Generator().manual_seed(seed)
    shape = (questions, group_size)
    rewards = torch.randint(0, 4, shape, generator=generator).double() / 2
    rewards[1] = 1.5  # a group without signal
    return rewards, torch.rand(shape, generator=generator) < 0.8


def by_hand(rewards, chosen, scale):
    """Group by group, from the chosen ones' lists."""
    rows = [[r for r, c in zip(*pair) if c] for pair in zip(rewards.tolist(), chosen.tolist())]
    everyone = [r for row in rows for r in row]
    result = torch.zeros_like(rewards)
    for q, row in enumerate(rows):
        if len(set(row)) < 2:
            continue
        over = {
            "std": stdev(row) + 1e-4, "batch_std": stdev(everyone) + 1e-4, "max_rl": fmean(row),
            "none": 1.0,
        }[scale]  # fmt: skip
        for g in range(rewards.shape[1]):
            result[q, g] = (rewards[q, g].item() - fmean(row)) / over if chosen[q, g] else 0.0
    return result


@pytest.mark.parametrize("scale", ["std", "batch_std", "max_rl", "none"])
def test_every_scale_is_its_formula_for_all_completions_and_for_chosen_ones(scale):
    for seed in range(5):
        rewards, chosen = rewards_and_chosen(seed)
        everyone = torch.ones_like(chosen)
        for which in (everyone, chosen):
            found = group_advantages(rewards, scale, None if which is everyone else which)
            assert (found - by_hand(rewards, which, scale)).abs().max() < 1e-12
        assert (found[1] == 0).all()


def test_one_right_answer_of_eight_weighs_as_much_as_seven_do_in_max_rl():
    """The gradient is the mean score of the right answers, less that of all: A sums to G over the
    right ones less what the mean takes, so a question with few of them pulls as hard."""
    rewards = torch.tensor([[1.0] + [0.0] * 7, [1.0] * 7 + [0.0]])
    advantages = group_advantages(rewards, "max_rl")
    assert torch.allclose(advantages[0], torch.tensor([7.0] + [-1.0] * 7))
    assert torch.allclose(advantages[1], torch.tensor([1 / 7] * 7 + [-1.0]))
    assert (group_advantages(torch.zeros(2, 8), "max_rl") == 0).all()


def test_below_0_max_rl_keeps_the_sign_and_stays_bounded():
    rewards = torch.tensor([[-1.0, -1.0, 0.0, -2.0], [1.0, -1.0, 1.0, -1.0 + 1e-6]])
    advantages = group_advantages(rewards, "max_rl")
    assert torch.equal(advantages.sign(), (rewards - rewards.mean(-1, keepdim=True)).sign())
    assert advantages.abs().max() <= 5


@pytest.mark.parametrize("scale", ["batch_std", "max_rl"])
def test_a_step_without_signal_has_none_at_any_scale(scale):
    rewards = torch.tensor([[0.8 + 0.1, 0.9], [0.0, 0.0]], dtype=torch.float64)
    assert (group_advantages(rewards, scale) == 0).all()
    nobody = torch.zeros(2, 2, dtype=torch.bool)
    assert (group_advantages(torch.rand(2, 2), scale, nobody) == 0).all()


# --- each reward by itself -----------------------------------------------------------------------


def test_each_function_is_scaled_by_itself_weighed_and_the_sum_scaled_by_the_step():
    for seed in range(5):
        parts = [rewards_and_chosen(seed), rewards_and_chosen(seed + 50)]
        chosen, weights = parts[0][1], [1.0, 3.0]
        each = [by_hand(rewards, chosen, "std") for rewards, _ in parts]
        total = sum(w * one for w, one in zip(weights, each))
        expected = total / (stdev(total[chosen].tolist()) + 1e-4)
        per_function = torch.stack([rewards for rewards, _ in parts], -1)
        found = decoupled_advantages(per_function, torch.tensor(weights).double(), chosen)
        assert (found - expected).abs().max() < 1e-12


def test_equal_totals_of_unequal_rewards_are_told_apart():
    """Two functions, four completions: right but untidy, tidy but wrong, both, neither."""
    per_function = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, 1.0]]])
    advantages = decoupled_advantages(per_function, torch.ones(2))[0]
    assert advantages[0] > advantages[3] > advantages[1]  # the rarer feat counts more
    total = group_advantages(per_function.sum(-1))[0]
    assert total[0] == total[3]
    assert decoupled_advantages(torch.ones(2, 4, 3), torch.ones(3)).abs().max() == 0


def rewards_of(per_function, weights):
    names = [f"f{i}" for i in range(len(weights))]
    return Rewards(names, per_function, (per_function * weights).sum(-1), weights)


def test_the_flag_reaches_the_rewards_with_their_weights_and_the_penalty_for_length():
    generator = torch.Generator().manual_seed(0)
    per_function = torch.rand(3, 4, 2, generator=generator, dtype=torch.float64)
    weights = torch.tensor([1.0, 0.25], dtype=torch.float64)
    halves = [rewards_of(part, weights) for part in per_function.split([1, 2])]
    args = SimpleNamespace(
        advantage_scale="gdpo", baseline="mean", overlong_buffer=4, max_completion_length=8
    )
    mask = torch.arange(8) < torch.randint(3, 9, (3, 4), generator=generator)[..., None]
    rewards = with_overlong_penalty(
        joined_rewards(halves), SimpleNamespace(completion_mask=mask), args
    )
    penalty = ((4 - mask.sum(-1)) / 4).clamp(-1, 0).double()
    expected = decoupled_advantages(
        torch.cat([per_function, penalty[..., None]], -1), torch.tensor([1.0, 0.25, 1.0]).double()
    )
    assert torch.equal(advantages_of(rewards, args), expected)
    args.advantage_scale = "none"
    assert torch.equal(advantages_of(rewards, args), group_advantages(rewards.total, "none"))


# --- TRL ---------------------------------------------------------------------------------------


def trl_advantages(per_function, weights, scale, file):
    """Advantages by the lines of TRL's GRPOTrainer, cut out of the method that also generates."""
    from trl import GRPOTrainer
    from trl.trainer.utils import nanstd

    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    start = source.index("unscorable_mask = torch.isnan(rewards_per_func)")
    end = source.index("# Slice to keep only the local part of the data")
    file.write_text(textwrap.dedent(" " * 8 + source[start:end]))
    size = per_function.shape[1]
    names = {
        "torch": torch, "nanstd": nanstd, "device": "cpu", "num_generations": size,
        "rewards_per_func": per_function.flatten(0, 1), "math": math,
        "self": SimpleNamespace(
            multi_objective_aggregation="normalize_then_sum" if scale == "gdpo" else
            "sum_then_normalize",
            scale_rewards={"std": "group", "batch_std": "batch"}.get(scale, "none"),
            reward_weights=weights, reward_funcs=[None] * len(weights),
        ),
    }  # fmt: skip
    return runpy.run_path(str(file), names)["advantages"].view(per_function.shape[:2])


@pytest.mark.benchmark
@pytest.mark.parametrize("scale", ["std", "batch_std", "gdpo", "none"])
def test_trl_has_the_same_advantages(scale, tmp_path):
    for seed in range(5):
        pair = [rewards_and_chosen(seed)[0], rewards_and_chosen(seed + 50)[0]]
        weights = torch.tensor([1.0, 3.0], dtype=torch.float64)
        rewards = rewards_of(torch.stack(pair, -1), weights)
        args = SimpleNamespace(advantage_scale=scale, baseline="mean")
        theirs = trl_advantages(rewards.per_function, weights, scale, tmp_path / "lines.py")
        assert (advantages_of(rewards, args) - theirs).abs().max() < 1e-6
