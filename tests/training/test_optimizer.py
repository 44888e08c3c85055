"""The optimizer's recipe: decay, schedule, and updates that are not taken."""

import math

import pytest
import torch
from conftest import make_args, make_model, make_setup
from toys import ADVANTAGES, rollouts_from

from training.optimizer import apply_gradients, make_optimizer
from training.update import update_policy


@pytest.mark.parametrize(
    ("loss", "gradient", "skipped"),
    [(1.0, 1.0, 0), (1.0, math.inf, 1), (1.0, math.nan, 1), (math.nan, 1.0, 1), (math.inf, 1.0, 1)],
)
def test_loss_and_gradient_must_both_be_finite(loss, gradient, skipped):
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.tensor([gradient, 1.0])
    optimizer = torch.optim.SGD([weight], lr=0.1)
    assert apply_gradients(optimizer, torch.tensor(loss), 1.0)[1] == skipped
    assert torch.equal(weight, torch.ones(2)) == bool(skipped)
    assert weight.grad is None


def test_weight_decay_acts_on_matrices_alone():
    model = make_model("qwen2")
    optimizer, _ = make_optimizer(model, make_args(weight_decay=0.3))
    decay = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        expected = 0.0 if name.endswith("bias") or "norm" in name else 0.3
        assert decay[id(parameter)] == expected, name


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("cosine", [0.25, 0.5, 0.75, 1.0, 1.0, 0.853553, 0.5, 0.146447]),
    ],
)
def test_the_learning_rate_warms_up_and_then_follows_its_schedule(schedule, expected):
    args = make_args(learning_rate=1.0, num_train_iters=8, warmup_percent=0.5, lr_schedule=schedule)
    optimizer, scheduler = make_optimizer(make_model(), args)
    rates = []
    for _ in range(8):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(expected, abs=1e-6)


def test_at_a_rate_of_1e_6_fp32_weights_move_and_bf16_ones_do_not(accelerator):
    def changed(dtype):
        model = make_model(dtype=dtype, vocab_size=14, initializer_range=0.02)
        start = [p.clone() for p in model.parameters() if p.ndim == 2]
        args = make_args(learning_rate=1e-6)
        optimizer, _ = make_optimizer(model, args)
        setup = make_setup(model, args, accelerator)
        for step in range(10):
            update_policy(setup, optimizer, rollouts_from(model, seed=step), ADVANTAGES)
        now = [p for p in model.parameters() if p.ndim == 2]
        moved = sum((a != b).sum().item() for a, b in zip(now, start))
        return moved / sum(p.numel() for p in now)

    assert changed(torch.float32) > 0.99
    assert changed(torch.bfloat16) < 0.5


def test_the_learning_rate_goes_on_where_it_was_and_follows_a_longer_run():
    def rates(done, iterations):
        args = make_args(
            learning_rate=1.0, num_train_iters=iterations, warmup_percent=0.25, lr_schedule="cosine"
        )
        optimizer, scheduler = make_optimizer(make_model(), args, done)
        seen = []
        for _ in range(done, iterations):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return seen

    for done in (1, 3, 7):
        assert rates(done, 8) == rates(0, 8)[done:]
    assert rates(8, 16) == rates(0, 16)[8:]
