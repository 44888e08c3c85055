"""What a reward function may return, and what becomes of it."""

import math
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_args, make_model, make_setup

from evaluation.scoring import call, score, with_overlong_penalty
from records.rollout_file import load_rollouts, save_rollouts
from rldatasets import Problem
from sampling.rollouts import Rollouts
from training.optimizer import make_optimizer
from training.update import update_policy
from utils import UserError

PROBLEM = Problem("How many?", "1", "")


def returning(value):
    def reward(completion, problem):
        return value

    return reward


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (torch.tensor(0.5), 0.5), (torch.tensor(3), 3.0), (torch.tensor(True), 1.0),
        (torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True), 0.5),
        (np.float32(0.25), 0.25), (np.float64(-1), -1.0), (np.int8(7), 7.0), (np.bool_(True), 1.0),
        (np.array(2.5), 2.5), (Fraction(1, 4), 0.25), (True, 1.0), (1e39, 1e39), (10**39, 1e39),
        (0.8 + 0.1, 0.8 + 0.1),
    ],
    ids=repr,
)  # fmt: skip
def test_numbers_of_any_library_count_and_none_is_rounded(value, number):
    assert call(returning(value), "text", PROBLEM) == number
    rewards = score(SimpleNamespace(texts=[["a", "b"]]), [PROBLEM], [returning(value)])
    assert rewards.per_function.dtype == rewards.total.dtype == torch.float64
    assert rewards.total.tolist() == [[number, number]]


@pytest.mark.parametrize(
    "value",
    [
        10**400, -(10**400), 10**5000, Fraction(10**400), math.nan, math.inf, np.float32("nan"),
        torch.tensor(math.inf), torch.tensor([1.0]), np.array([1.0]), torch.tensor(1j),
        1j, np.complex64(1), "1", np.str_("1"), None, [1.0], Decimal("1"), object(), 1e101, -1e300,
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_whatever_is_no_finite_number_is_one_line(value):
    with pytest.raises(UserError) as error:
        call(returning(value), "text", PROBLEM)
    assert "reward function reward returned " in str(error.value)
    assert str(error.value).count("\n") == 0


def test_what_cannot_be_shown_is_named_by_its_type():
    class Shy:
        def __repr__(self):
            raise ValueError("not today")

    with pytest.raises(UserError, match="returned a Shy, not a finite number"):
        call(returning(Shy()), "text", PROBLEM)


def rollouts(dtype=torch.float32):
    mask = torch.ones(1, 2, 3, dtype=torch.bool)
    return Rollouts(
        prompt_ids=[torch.tensor([1, 2])],
        completion_ids=torch.tensor([[[3, 4, 5], [6, 7, 8]]]),
        completion_mask=mask,
        logprobs=torch.zeros(1, 2, 3, dtype=dtype),
        finished=mask[..., 0],
        texts=[["a", "b"]],
    )


def test_the_penalty_for_length_joins_in_fp64():
    args = make_args(overlong_buffer=3, max_completion_length=4)
    scored = score(rollouts(), [PROBLEM], [returning(0.1)])
    rewards = with_overlong_penalty(scored, rollouts(), args)
    assert rewards.per_function.dtype == torch.float64
    assert rewards.total.tolist() == [[0.1 - 2 / 3] * 2]


def test_rewards_are_kept_in_fp64_and_older_files_are_read(tmp_path):
    scored = score(rollouts(), [PROBLEM], [returning(0.1)])
    chosen = torch.ones(1, 2, dtype=torch.bool)
    for dtype in (torch.float64, torch.float32):
        rewards = type(scored)(scored.names, *(x.to(dtype) for x in (scored.per_function,
                                                                      scored.total,
                                                                      scored.weights)))  # fmt: skip
        advantages = torch.tensor([[1.0, -1.0]], dtype=dtype)
        path = tmp_path / "step.safetensors"
        save_rollouts(path, rollouts(), rewards, advantages, chosen)
        _, read, again, _ = load_rollouts(path)
        assert read.total.dtype == again.dtype == dtype
        assert torch.equal(read.total, rewards.total)


def test_training_is_in_the_model_s_dtype_whatever_the_advantages_are_in():
    advantages = torch.tensor([[1.0, -1.0]], dtype=torch.float64) / 3
    moved = []
    for given in (advantages, advantages.float()):
        policy = make_model()
        setup = make_setup(policy, make_args())
        optimizer, _ = make_optimizer(policy, setup.args)
        metrics = update_policy(setup, optimizer, rollouts(), given)
        assert math.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
        assert {p.grad.dtype for p in policy.parameters() if p.grad is not None} <= {torch.float32}
        moved.append([p.detach().clone() for p in policy.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*moved))
