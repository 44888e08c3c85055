"""fp16 and bf16: what scaling the loss changes, which is nothing, and what an overflow does."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from conftest import make_args, make_model, make_setup
from toys import (
    ADVANTAGES,
    RecordingSGD,
    distance,
    gradients,
    move,
    resuming,
    rollouts_from,
    saver_of,
    toy,
)

from records.checkpoints import checkpoint_to_resume
from records.resuming import check_same_flags
from training import precision
from training.optimizer import make_optimizer
from training.precision import GROW_AFTER, LossScale, loss_scale_of, resolved
from training.update import update_policy
from utils import UserError

FP16 = partial(torch.autocast, "cpu", torch.float16)


@pytest.fixture
def in_fp16():
    """accelerate itself has fp16 on GPUs alone."""
    accelerator = Accelerator(cpu=True)
    accelerator.autocast = FP16
    return accelerator


def sampled(model, **more):
    with FP16():
        return rollouts_from(model, **more)


def updated(model, accelerator, loss_scale, advantages=ADVANTAGES, rollouts=None, **flags):
    """Metrics of one update, and the optimizer."""
    args = make_args(max_completion_length=10, **flags)
    optimizer, _ = make_optimizer(model, args)
    setup = replace(make_setup(model, args, accelerator), loss_scale=loss_scale)
    rollouts = sampled(model) if rollouts is None else rollouts
    return update_policy(setup, optimizer, rollouts, advantages), optimizer


def test_fp16_is_nearer_to_fp32_than_bf16_is_in_mismatch_and_gradient(in_fp16):
    model, mismatches, errors = toy(torch.float32), {}, {}
    for dtype in (torch.bfloat16, torch.float16):
        in_fp16.autocast = partial(torch.autocast, "cpu", dtype)
        with in_fp16.autocast():
            rollouts = rollouts_from(model)
        ours, metrics = gradients(model, rollouts, in_fp16)
        exact, _ = gradients(model, rollouts, Accelerator(cpu=True))
        mismatches[dtype], errors[dtype] = metrics["mismatch"], distance(ours, exact)
    assert 0 < 4 * mismatches[torch.float16] < mismatches[torch.bfloat16] < 0.05
    assert errors[torch.float16] < 0.03 < errors[torch.bfloat16]


def test_a_scaled_loss_gives_the_same_metrics_and_gradients(in_fp16):
    """To rounding; nothing here is so small that fp16 loses it."""
    model, results = toy(torch.float32), []
    rollouts = sampled(model)
    for scale in (1.0, 2.0**12):
        setup = make_setup(model, make_args(max_completion_length=10), in_fp16)
        setup = replace(setup, loss_scale=LossScale(scale))
        metrics = update_policy(setup, optimizer := RecordingSGD(model), rollouts, ADVANTAGES)
        results.append((metrics, optimizer.seen))
    (plain, expected), (scaled, ours) = results
    assert scaled == pytest.approx(plain, rel=1e-3) and scaled["grad_norm"] > 0
    assert distance(ours, expected) < 2e-3


def test_scaled_small_gradients_are_kept_where_fp16_loses_them(in_fp16):
    """Advantages of 1e-6: below what fp16 holds, and exactly what 1e-6 of the gradient is."""
    model = toy(torch.float32)
    rollouts = sampled(model)
    norms = {}
    for name, scale, factor in (("whole", 1.0, 1.0), ("lost", 1.0, 1e-6), ("kept", 2.0**16, 1e-6)):
        copy = toy(torch.float32)
        metrics, _ = updated(copy, in_fp16, LossScale(scale), factor * ADVANTAGES, rollouts)
        norms[name] = metrics["grad_norm"] / factor
    assert norms["kept"] == pytest.approx(norms["whole"], rel=1e-2)
    assert abs(norms["lost"] / norms["whole"] - 1) > 0.05


def test_an_overflow_skips_the_update_changes_nothing_and_halves_the_scale(in_fp16):
    model, loss_scale = toy(torch.float32), LossScale(2.0**40, moves=True)
    before = [parameter.clone() for parameter in model.parameters()]
    metrics, optimizer = updated(model, in_fp16, loss_scale)
    assert metrics["skipped"] == 1 and loss_scale.scale == 2.0**39
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert not optimizer.state and all(p.grad is None for p in model.parameters())
    metrics, _ = updated(model, in_fp16, loss_scale := LossScale(2.0**10, moves=True))
    assert metrics["skipped"] == 0 and loss_scale == LossScale(2.0**10, 1, moves=True)


def test_a_scale_doubles_after_so_many_good_updates_in_a_row_and_ends_at_1():
    loss_scale = LossScale(4.0, moves=True)
    for finite in [True] * (GROW_AFTER - 1) + [False] + [True] * (GROW_AFTER - 1):
        loss_scale.learn(finite)
    assert loss_scale.scale == 2.0
    loss_scale.learn(True)
    assert (loss_scale.scale, loss_scale.good) == (4.0, 0)
    for _ in range(9):
        loss_scale.learn(False)
    assert loss_scale.scale == 1.0
    fixed = loss_scale_of("bf16")
    fixed.learn(False)
    assert fixed == LossScale(1.0, 0, moves=False)


def test_a_checkpoint_keeps_the_scale(tmp_path):
    saver = saver_of(tmp_path)
    vars(saver.loss_scale).update(scale=512.0, good=7, moves=True)
    move(saver)
    saver.save()
    start = checkpoint_to_resume(resuming(tmp_path))
    assert saver_of(tmp_path, make_model(seed=1), start=start).loss_scale == LossScale(
        512.0, 7, True
    )


def test_skips_end_a_run_only_once_the_scale_cannot_shrink(tmp_path):
    saver = saver_of(tmp_path)
    saver.loss_scale.scale = 2.0
    for done in range(1, 6):
        saver.completed(done, skipped=1)
    saver.loss_scale.scale = 1.0
    with pytest.raises(UserError, match="3 steps in a row"):
        for done in range(6, 9):
            saver.completed(done, skipped=1)


def test_auto_goes_by_what_the_device_has(monkeypatch):
    for amx, expected in ((False, "fp32"), (True, "bf16")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has=amx: has)
        assert resolved("auto", on_gpu=False) == expected
        assert resolved("auto") == ("bf16" if torch.cuda.is_available() else expected)
    assert resolved("auto", on_gpu=True) == "bf16" and resolved("fp16", on_gpu=False) == "fp16"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for has, expected in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(precision, "gpu_has_bf16", lambda has=has: has)
        assert resolved("auto") == expected


def test_what_the_device_lacks_is_told_or_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--precision fp16: is for GPUs"):
        precision.check_precision("fp16")
    for amx, avx512 in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has=amx: has)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=avx512: has)
        precision.check_precision("bf16")
        lacks = "this CPU has no units for it; fp32" in capsys.readouterr().err
        assert lacks == (not amx and not avx512)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(precision, "gpu_has_bf16", lambda: False)
    precision.check_precision("bf16")
    assert "this GPU has no units for it; fp16" in capsys.readouterr().err
    precision.check_precision("fp16")
    assert capsys.readouterr().err == ""


def test_a_run_goes_on_in_its_precision_or_not_at_all():
    args = make_args(precision="fp32")
    check_same_flags(args, {"precision": "fp32"})
    check_same_flags(args, {})  # a run of before there was the flag
    with pytest.raises(UserError, match=r"--precision \(was bf16"):
        check_same_flags(args, {"precision": "bf16"})


@pytest.mark.gpu
def test_a_step_on_the_gpu_in_fp16():
    accelerator = Accelerator(mixed_precision="fp16")
    model, loss_scale = toy(torch.float32).to("cuda"), loss_scale_of("fp16")
    with accelerator.autocast():
        rollouts = rollouts_from(model)
    metrics, _ = updated(model, accelerator, loss_scale, rollouts=rollouts)
    assert metrics["skipped"] == 0 and metrics["mismatch"] < 0.01 and metrics["grad_norm"] > 0
    assert loss_scale.good == 1
    assert {p.dtype for p in model.parameters()} == {torch.float32}
