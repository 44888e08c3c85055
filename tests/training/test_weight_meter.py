"""Shares of changed weights against a full count, and what storing weights in bf16 does to them."""

import pytest
import torch
from conftest import make_args, make_model

from training.optimizer import apply_gradients, make_optimizer
from training.weight_meter import WeightMeter


def update(model, optimizer, seed=0, loss=1.0):
    """One update with random gradients of the size that Adam makes of them: the learning rate."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    apply_gradients(optimizer, torch.tensor(loss), 0.0)


def counted(model, optimizer, seed=0):
    """An update, and both shares counted weight by weight on full copies."""
    before = [p.detach().clone() for p in model.parameters()]
    update(model, optimizer, seed)
    changed = would_change = total = 0
    for old, new in zip(before, model.parameters()):
        stored = old.to(torch.bfloat16)
        moved = stored.double() + (new.detach().double() - old.double())
        changed += int((new != old).sum())
        would_change += int((moved.to(torch.bfloat16) != stored).sum())
        total += old.numel()
    return changed / total, would_change / total


def watched(learning_rate, sample=2**20, **settings):
    model = make_model(initializer_range=0.02)
    args = make_args(learning_rate=learning_rate, **settings)
    optimizer, _ = make_optimizer(model, args)
    return model, optimizer, WeightMeter(optimizer, sample)


@pytest.mark.parametrize("learning_rate", [1e-7, 1e-5, 1e-4])
def test_where_all_weights_are_looked_at_the_shares_are_those_of_a_full_count(learning_rate):
    model, optimizer, meter = watched(learning_rate)
    assert meter.stride == 1
    shares = meter.shares()
    assert shares == {"weights_changed": 0, "weights_changed_bf16": 0}
    changed, would_change = counted(model, optimizer)
    assert meter.shares() == pytest.approx(
        {"weights_changed": changed, "weights_changed_bf16": would_change}, abs=1e-6
    )


def test_a_sample_is_every_kth_of_all_weights_and_close_to_the_full_count():
    model, optimizer, meter = watched(3e-5, sample=4000)
    row = torch.cat([p.flatten() for group in optimizer.param_groups for p in group["params"]])
    assert meter.stride == 7 and len(row) > 20_000
    assert torch.equal(meter._look(), row[::7])
    changed, would_change = counted(model, optimizer)
    shares = meter.shares()
    assert 0.05 < would_change < 0.95
    error = 4 * (0.25 / 4000) ** 0.5
    assert shares["weights_changed"] == pytest.approx(changed, abs=error)
    assert shares["weights_changed_bf16"] == pytest.approx(would_change, abs=error)


def test_shares_are_means_over_the_updates_since_they_were_asked_for():
    model, optimizer, meter = watched(1e-5)
    counts = [counted(model, optimizer, seed)[1] for seed in range(3)]
    assert meter.shares()["weights_changed_bf16"] == pytest.approx(sum(counts) / 3, abs=1e-6)
    last = counted(model, optimizer, 3)[1]
    assert meter.shares()["weights_changed_bf16"] == pytest.approx(last, abs=1e-6)


def test_a_skipped_update_changes_nothing():
    model, optimizer, meter = watched(1e-3)
    update(model, optimizer, loss=torch.nan)
    assert meter.shares() == {"weights_changed": 0, "weights_changed_bf16": 0}


def test_weights_kept_in_bf16_are_rounded_from_the_first_to_the_last_update():
    model, optimizer, meter = watched(3e-5, weights_dtype="bfloat16")
    for seed in range(3):
        assert all(torch.equal(p, p.bfloat16().float()) for p in model.parameters())
        before = [p.detach().clone() for p in model.parameters()]
        update(model, optimizer, seed)
        moved = sum(int((p != old).sum()) for p, old in zip(model.parameters(), before))
        share = moved / sum(p.numel() for p in before)
        shares = meter.shares()
        assert 0.05 < share < 0.95
        assert shares["weights_changed"] == shares["weights_changed_bf16"]
        assert shares["weights_changed"] == pytest.approx(share, abs=1e-6)


@pytest.mark.parametrize(
    ("step", "stored"),  # around 0.02 bf16 numbers are 2^-13 apart: 1.2e-4
    [(1e-6, 0.02001953125), (5e-5, 0.02001953125), (7e-5, 0.0198974609375)],
)
def test_a_bf16_weight_moves_by_whole_steps_or_not_at_all(step, stored):
    weight = torch.nn.Parameter(torch.tensor([[0.02]]))
    model = torch.nn.ParameterList([weight])
    optimizer, _ = make_optimizer(
        model, make_args(learning_rate=step, weight_decay=0.0, weights_dtype="bfloat16")
    )
    weight.grad = torch.ones(1, 1)
    optimizer.step()
    assert weight.item() == stored
