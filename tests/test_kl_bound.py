"""k3 holds where the policy has all but forgotten a token that the reference likes."""

import math

import pytest
import torch

from grpo import LINEAR_ABOVE, Batch, Objective, grpo_loss, kl_estimate


@pytest.mark.parametrize("log_ratio", [-100.0, -3.0, 0.0, 0.5, 3.0, 9.999])
def test_below_the_bound_k3_is_exact(log_ratio):
    logprobs, reference = torch.zeros(1).double(), torch.tensor([log_ratio], dtype=torch.float64)
    exact = math.exp(log_ratio) - 1 - log_ratio
    assert kl_estimate(logprobs, reference).item() == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("log_ratio", [11.0, 50.0, 100.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_above_it_the_estimate_and_its_gradient_stay_finite_and_go_on_rising(log_ratio, dtype):
    logprobs = torch.tensor([-log_ratio], dtype=dtype, requires_grad=True)
    value = kl_estimate(logprobs, torch.zeros(1, dtype=dtype))
    value.backward()
    slope = math.exp(LINEAR_ABOVE)
    assert value.item() == pytest.approx(slope * (1 + log_ratio - LINEAR_ABOVE) - 1 - log_ratio)
    assert -logprobs.grad.item() == pytest.approx(slope - 1, rel=1e-6)  # still pulls back


def test_at_the_bound_value_and_slope_meet():
    def at(x):
        leaf = torch.tensor([-x], dtype=torch.float64, requires_grad=True)
        value = kl_estimate(leaf, torch.zeros(1).double())
        value.backward()
        return value.item(), leaf.grad.item()

    below, above = at(LINEAR_ABOVE - 1e-9), at(LINEAR_ABOVE + 1e-9)
    assert below[0] == pytest.approx(above[0], rel=1e-6)
    assert below[1] == pytest.approx(above[1], rel=1e-6)


def test_one_forgotten_token_does_not_spoil_a_step():
    logprobs = torch.tensor([[-100.0, -1.0]], requires_grad=True)
    batch = Batch(logprobs.detach(), torch.ones(1), torch.full((1, 2), 0.5), torch.zeros(1, 2))
    loss, sums = grpo_loss(logprobs, batch, Objective(kl_beta=0.04))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logprobs.grad).all()
    assert torch.isfinite(sums["kl"])
