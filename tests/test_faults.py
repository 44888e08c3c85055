"""The long campaign: kills, signals, damage and faults. `make test-faults` runs it."""

import contextlib
import copy
import errno
import functools
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import make_args, make_tokenizer
from faults import (
    MOVING,
    STEPS,
    Process,
    Toy,
    assert_same_run,
    kill_and_resume,
    lines,
    operations,
    plant_kill,
    signal_in,
)
from safetensors import SafetensorError

import evaluator
import main
import records.run
from launch import loading
from records import checkpoints
from records.checkpoints import checkpoint_to_resume, checkpoints_in
from records.manifest import damage
from sampling import groups
from training import update

pytestmark = pytest.mark.faults
PARTS = 8  # of the kills, so that two processes share them


@pytest.fixture(scope="session")
def toy(saved_models, tmp_path_factory):
    return Toy(tmp_path_factory.mktemp("toy"), saved_models["qwen2"])


@pytest.fixture(scope="session")
def straight(toy):
    """A run that nothing interrupts, and its file operations."""
    found = operations(toy, "straight")
    return toy.path("straight"), found


@pytest.fixture(scope="session")
def interrupted(toy, straight):
    """A run that died in its second checkpoint, and the file operations of going on."""
    number = straight[1].index("fsync /checkpoints/step_00004.new/optimizer.pt")
    run = toy.path("interrupted")
    assert toy.run("interrupted", plant=plant_kill(run, number)).wait() == -signal.SIGKILL
    shutil.copytree(run, toy.path("interrupted_copy"))
    return run, operations(toy, "interrupted_copy", "--resume")


def test_the_kills_are_at_least_200_and_at_every_kind_of_operation(straight, interrupted):
    found = straight[1] + interrupted[1]
    assert len(found) >= 200
    kinds = {line.split()[0] for line in found}
    assert kinds == {"open", "written", "fsync", "os.mkdir", "os.rename", "os.remove", "os.rmdir",
                     "os.link"}  # fmt: skip


@pytest.mark.parametrize("part", range(PARTS))
def test_a_run_killed_at_any_file_operation_goes_on(part, toy, straight):
    run, found = straight
    for number in range(part, len(found), PARTS):
        kill_and_resume(toy, run, number)


@pytest.mark.parametrize("part", range(PARTS))
def test_a_run_killed_at_any_file_operation_of_going_on_goes_on(part, toy, straight, interrupted):
    base, found = interrupted
    for number in range(part, len(found), PARTS):
        kill_and_resume(toy, straight[0], number, base=base)


# --- signals -------------------------------------------------------------------------------------

# phase, its call (the toy's steps call `policy` twice each), steps that are done by then
MOMENTS = [
    ("loading", 1, 0), ("cold start", 1, 0), ("evaluation", 1, 0), ("sampling", 1, 0),
    ("sampling", 4, 3), ("rewards", 2, 1), ("rewards", 6, 5), ("policy", 1, 0), ("policy", 7, 3),
    ("policy", 8, 4), ("evaluation", 2, 3), ("evaluation", 3, 6), ("saving", 1, 2),
    ("saving", 2, 4), ("saving", 3, 6),
]  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("phase", "call", "done"), MOMENTS)
def test_a_signal_in_any_phase_loses_no_step(phase, call, done, number, toy, straight):
    """The second call of `policy` in a step is its second inner epoch: the signal waits for it.
    SIGTERM comes at no particular moment of the phase, or just after it."""
    name = f"{phase}-{call}-{number}".replace(" ", "_")
    anywhere = number == signal.SIGTERM and done < STEPS
    moment = {"pause": 0, "delay": random.Random(name).uniform(0, 0.1)} if anywhere else {}
    status, seconds, process = signal_in(toy, name, phase, number, call, **moment)
    run = toy.path(name)
    assert status == 128 + number, process.text()
    assert seconds < 5
    assert f"interrupted by {number.name}" in process.text().splitlines()[-1]
    assert "Traceback" not in process.text()
    logged = len(lines(run / "metrics.jsonl"))
    assert logged >= done if anywhere else logged == done
    again = toy.run(name, "--resume_or_start")
    assert again.wait() == 0, again.text()
    assert again.resumed_at() == logged
    assert_same_run(run, straight[0])


@pytest.mark.parametrize("phase", ["policy", "saving"])
def test_a_second_signal_ends_the_process_now(phase, toy, straight):
    """Where the first one waits: in a second inner epoch, and in the second checkpoint."""
    call = {"policy": 6, "saving": 2}[phase]
    status, seconds, _ = signal_in(
        toy, f"twice-{phase}", phase, signal.SIGTERM, call, pause=30, twice=True
    )
    assert status == 143 and seconds < 5
    again = toy.run(f"twice-{phase}", "--resume")
    assert again.wait() == 0, again.text()
    assert again.resumed_at() == 2
    assert_same_run(toy.path(f"twice-{phase}"), straight[0])


def test_the_same_steps_interrupted_at_every_one_end_in_the_same_weights(toy):
    """With a reference that moves, and no checkpoint but those of signals."""
    more = [*MOVING, "--save_steps", "0"]
    assert toy.run("moving", *more).wait() == 0
    for step in range(1, STEPS):
        status, _, process = signal_in(
            toy, "often", "sampling", signal.SIGTERM, call=2, more=(*more, "--resume_or_start")
        )
        assert status == 143, process.text()
        assert len(lines(toy.path("often") / "metrics.jsonl")) == step
    again = toy.run("often", *more, "--resume")
    assert again.wait() == 0 and again.resumed_at() == STEPS - 1
    assert_same_run(toy.path("often"), toy.path("moving"))


# --- damage --------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def kept(toy):
    """A run with the checkpoints of steps 2, 4 and 6, and what resumes it."""
    assert toy.run("kept", *MOVING, "--keep_checkpoints", "5").wait() == 0
    return toy.path("kept")


def flip(rng):
    def mutate(path):
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)

    return mutate


def edit(change):
    """The manifest after change(manifest), written as a person would."""

    def mutate(folder):
        file = folder / "manifest.json"
        manifest = json.loads(file.read_text())
        file.write_text(json.dumps(change(manifest) or manifest, indent=1, sort_keys=True) + "\n")

    return mutate


def mutations(folder):
    """(name, what to do to a copy of the newest checkpoint) for every way of damage."""
    rng = random.Random(0)

    def on(name, action):
        return lambda copy: action(copy / name)

    for path in sorted(folder.iterdir()):
        name, size = path.name, path.stat().st_size
        for i in range(5):
            yield f"bit {i} of {name}", on(name, flip(rng))
        yield f"{name} empty", on(name, lambda file: os.truncate(file, 0))
        yield f"{name} half", on(name, lambda file, size=size: os.truncate(file, size // 2))
        yield (
            f"{name} one byte short",
            on(name, lambda file, size=size: os.truncate(file, size - 1)),
        )
        yield f"{name} longer", on(name, lambda file: file.write_bytes(file.read_bytes() + b"\0"))
        yield f"{name} zeroed", on(name, lambda file, size=size: file.write_bytes(bytes(size)))
        yield f"{name} missing", on(name, lambda file: file.unlink())
        yield f"{name} a directory", on(name, lambda file: (file.unlink(), file.mkdir()))
        older = folder.parent / "step_00002" / name
        if older.read_bytes() != path.read_bytes():
            yield f"{name} of step 2", on(name, lambda file, old=older: shutil.copy(old, file))
    for one, other in itertools.combinations(("model.safetensors", "reference.safetensors",
                                              "optimizer.pt"), 2):  # fmt: skip

        def swap(copy, one=one, other=other):
            (copy / one).rename(copy / "third")
            (copy / other).rename(copy / one)
            (copy / "third").rename(copy / other)

        yield f"{one} and {other} swapped", swap
    weights = "model.safetensors"
    for name, change in {
        "step": lambda m: m.update(step=5),
        "size": lambda m: m["files"][weights].update(size=1),
        "sha256": lambda m: m["files"][weights].update(sha256="0" * 64),
        "a file less": lambda m: m["files"].pop(weights) and None,
        "no files": lambda m: m.update(files={}),
        "another file": lambda m: m["files"].update(x={"size": 0, "sha256": ""}),
        "flags": lambda m: m["flags"].update(seed=1),
        "data": lambda m: m["data"].update(train_problems=1),
        "a list": lambda m: [m],
        "no step": lambda m: m.pop("step") and None,
        "no checksum": lambda m: m.pop("sha256") and None,
    }.items():
        yield f"manifest: {name}", edit(change)
    yield "manifest: spaces", on("manifest.json", lambda f: f.write_text(f.read_text() + " "))
    for step in (5, 7, 8):  # a later step's name
        yield (
            f"named step {step}",
            lambda copy, step=step: copy.rename(copy.with_name(f"step_0000{step}")),
        )
    yield "an empty directory", lambda copy: [path.unlink() for path in copy.iterdir()]
    yield "a file in its place", lambda copy: (shutil.rmtree(copy), copy.write_text(""))


def test_100_kinds_of_damage_are_all_detected(kept, tmp_path, capsys):
    found = list(mutations(kept / "checkpoints" / "step_00006"))
    assert len(found) >= 100
    flags = json.loads((kept / "config.json").read_text())["flags"]
    args = make_args(**{**flags, "output_dir": str(tmp_path / "run"), "resume": "latest"})
    for name, mutate in found:
        shutil.copytree(kept / "checkpoints", tmp_path / "run" / "checkpoints")
        mutate(tmp_path / "run" / "checkpoints" / "step_00006")
        assert checkpoint_to_resume(args).step == 4, name
        assert capsys.readouterr().err.count("is passed over: ") == 1, name
        shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize("name", ["bit 0 of model.safetensors", "optimizer.pt half", "named step 8",
                                  "reference.safetensors missing"])  # fmt: skip
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(name, toy, kept):
    copied = name.replace(" ", "_")
    run = toy.path(copied)
    shutil.copytree(kept, run)
    dict(mutations(run / "checkpoints" / "step_00006"))[name](run / "checkpoints" / "step_00006")
    again = toy.run(copied, *MOVING, "--resume")
    assert again.wait() == 0, again.text()
    assert again.resumed_at() == 4
    assert_same_run(run, kept)


# --- faults while running ------------------------------------------------------------------------


def at_call(owner, name, number, action, last=None):
    """From its call of that number to the `last` one (the same), call action(original, *args)."""
    original, count = getattr(owner, name), itertools.count(1)

    def wrapper(*args, **kwargs):
        if number <= next(count) <= (last or number):
            return action(functools.partial(original, *args, **kwargs), *args)
        return original(*args, **kwargs)

    return lambda: setattr(owner, name, wrapper)


def raising(error):
    def action(call, *args):
        raise error

    return action


def spoilt_loss(call, *args):
    loss, sums = call()
    return loss * math.nan, sums


def spoilt_gradient(call, logprobs, *args):
    logprobs.register_hook(lambda gradient: gradient * math.inf)
    return call()


def guard_parameters():
    """An update that is skipped must have left weights and moments alone."""
    original = update.apply_gradients

    def guarded(optimizer, loss, max_grad_norm, loss_scale):
        tensors = [p for group in optimizer.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in tensors]
        moments = copy.deepcopy(optimizer.state_dict()["state"])
        norm, skipped = original(optimizer, loss, max_grad_norm, loss_scale)
        if skipped:
            assert all(torch.equal(p, q) for p, q in zip(tensors, before))
            after = optimizer.state_dict()["state"]
            assert all(torch.equal(after[i][k], moments[i][k]) for i in moments for k in moments[i])
        return norm, skipped

    update.apply_gradients = guarded


def all_of(*plants):
    return lambda: [plant() for plant in plants]


def reward(function):
    """Replace the reward by function(completion, problem) from the third step on."""

    def plant():
        steps = itertools.count(1)
        original = main.draw_groups

        def draw_groups(*args, **kwargs):
            if next(steps) == 3:
                evaluator.REWARD_FUNCTIONS[:] = [function]
            return original(*args, **kwargs)

        main.draw_groups = draw_groups

    return plant


def hangs(completion, problem):
    while True:
        pass


def hangs_in_a_pattern(completion, problem):
    return float(bool(re.fullmatch(r"(a+)+b", "a" * 64)))


def swallows_everything(completion, problem):
    for _ in range(2):
        with contextlib.suppress(BaseException):
            time.sleep(60)
    return 1.0


def limit_files(size):
    return lambda call, *args: (
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)), call()
    )[1]  # fmt: skip


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")
LAST_WHOLE = r"step_00002 is whole; mend that, then --resume"


def returning(value):
    def wrong(completion, problem):
        return value

    return wrong


def names(complaint):
    """What a message about a reward function says: its name, the complaint, and where to look."""
    return rf"reward function \S+ {complaint}.*; see .*/completions/"


# What happens; how it is planted; exit status; what the last line says; the steps that are saved.
FAULTS = {
    "one loss is NaN": (
        all_of(guard_parameters, at_call(update, "grpo_loss", 5, spoilt_loss)), 0, "The report", 6,
    ),
    "one gradient is infinite": (
        all_of(guard_parameters, at_call(update, "grpo_loss", 5, spoilt_gradient)), 0, "report", 6,
    ),
    "losses stay NaN": (
        all_of(guard_parameters, at_call(update, "grpo_loss", 5, spoilt_loss, 99)), 2,
        "not finite in 3 steps in a row, all skipped; step_00004 is whole; lower --learning", 5,
    ),
    "the GPU's memory is full in sampling": (
        at_call(groups, "sample_rollouts", 4, raising(torch.OutOfMemoryError("CUDA"))), 2,
        r"out of memory \(sampling\): lower --sampling_batch_size", 3,
    ),
    "memory is full in a reward": (
        at_call(main, "score", 4, raising(MemoryError())), 2, r"out of memory \(rewards\)", 3,
    ),
    "memory is full in the reference": (
        at_call(update, "logprobs_without_gradient", 4, raising(MemoryError())), 2,
        r"out of memory \(reference\): lower --micro_batch_tokens", 3,
    ),
    "memory is full in an update": (
        at_call(update, "grpo_loss", 7, lambda *_: torch.empty(2**60)), 2,
        r"out of memory \(policy\): lower --micro_batch_tokens", 3,
    ),
    "memory is full in the middle of an update": (
        at_call(update, "grpo_loss", 8, lambda *_: torch.empty(2**60)), 2,
        r"out of memory \(policy\): lower --micro_batch_tokens", 2,
    ),
    "memory is full in an evaluation": (
        at_call(main, "evaluate_policy", 2, lambda *_: torch.empty(2**60)), 2,
        r"out of memory \(evaluation\): lower --eval_batch_size", 3,
    ),
    "memory is full in the cold start": (
        at_call(main, "cold_start", 1, raising(MemoryError())), 2,
        r"out of memory \(cold start\): lower --micro_batch_tokens", 0,
    ),
    "memory is full in loading": (
        at_call(loading, "load_policy", 1, raising(MemoryError())), 2,
        r"out of memory \(loading\)", 0,
    ),
    "a reward raises": (reward(lambda c, p: {}[c]), 2, names("raised KeyError"), 2),
    "a reward hangs": (reward(hangs), 2, names("took more than --reward_timeout 0.2 seconds"), 2),
    "a pattern hangs": (
        reward(hangs_in_a_pattern), 2, names("took more than --reward_timeout 0.2 seconds"), 2,
    ),
    "a reward hangs and swallows what ends it": (
        reward(swallows_everything), 2, names("took more than --reward_timeout 0.2 seconds"), 2,
    ),
    "a reward is text": (reward(returning("1")), 2, names("returned '1', not a finite"), 2),
    "a reward is NaN": (reward(returning(math.nan)), 2, names("returned nan, not a finite"), 2),
    "a reward is infinite": (reward(returning(math.inf)), 2, names("returned inf, not"), 2),
    "a reward is None": (reward(returning(None)), 2, names("returned None, not a finite"), 2),
    "a reward exits": (reward(lambda c, p: sys.exit(3)), 3, None, 2),
    "rewards are all equal": (reward(returning(1.0)), 0, "The report", 6),
    "the disk is full in a checkpoint": (
        at_call(torch, "save", 2, raising(NO_SPACE)), 2,
        rf"step_00004 not written: No space left on device; {LAST_WHOLE}", 2,
    ),
    "the disk is full when a checkpoint is flushed": (
        at_call(checkpoints, "_flush", 20, raising(NO_SPACE)), 2,
        rf"step_00004 not written: No space left on device; {LAST_WHOLE}", 2,
    ),
    "weights grow beyond what a file may hold": (
        at_call(groups, "sample_rollouts", 4, limit_files(60_000)), 2,
        rf"step_00004 not written: .*; {LAST_WHOLE}", 2,
    ),
    "moments grow beyond what a file may hold": (
        at_call(groups, "sample_rollouts", 4, limit_files(150_000)), 2,
        rf"step_00004 not written: .*; {LAST_WHOLE}", 2,
    ),
    "the disk is full in the log": (
        at_call(records.run, "write_jsonl", 10, raising(NO_SPACE)), 2,
        "no room to write; step_00002 is whole; make some, then go on by --resume", 2,
    ),
    "the disk is full in the rollouts": (
        at_call(
            records.run, "save_rollouts", 3, raising(SafetensorError("I/O: full (os error 28)"))
        ), 2,
        "no room to write; step_00002 is whole; make some, then go on by --resume", 2,
    ),
    "too little room for a checkpoint": (
        at_call(shutil, "disk_usage", 2, lambda *_: SimpleNamespace(free=5)), 2,
        rf"it needs [\d,]+ bytes of disk, 5 are free; {LAST_WHOLE}", 2,
    ),
    "a checkpoint reads back damaged": (
        at_call(checkpoints, "damage", 2, lambda *_: "model.safetensors was changed"), 2,
        rf"read back, model.safetensors was changed; {LAST_WHOLE}", None,
    ),
    "an error of our own": (at_call(main, "step_metrics", 4, raising(KeyError("x"))), 70, None, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_has_its_outcome_and_the_next_command_goes_on(name, toy, straight):
    plant, status, message, saved = FAULTS[name]
    folder = f"fault{list(FAULTS).index(name)}"
    run = toy.path(folder)
    more = ["--reward_timeout", "0.2"] if "hangs" in name else []
    more += ["--save_rollouts"] if "rollouts" in name else []
    process = toy.run(folder, *more, plant=plant)
    assert process.wait() == status, process.text()
    if message:
        error = [line for line in process.text().splitlines() if line][-1]
        assert re.search(message, error), error
        assert status == 0 or len(error.replace(str(toy.folder), "")) <= 230
        assert "Traceback" not in process.text()
    if saved is not None and run.exists():
        whole = [step for step, path in checkpoints_in(run / "checkpoints") if not damage(path)]
        assert max(whole, default=0) == saved
    again = toy.run(folder, "--resume_or_start", "--reward_timeout", "60")
    assert again.wait() == 0, again.text()
    if "loss" not in name and "gradient" not in name and (status or message is None):
        assert_same_run(run, straight[0])


@pytest.mark.parametrize(
    ("more", "warning"),
    [(["--max_completion_length", "1"], "truncated: 100% of the completions were cut off"),
     ([], "flat_groups: in 100% of the groups all completions earned the same")],
)  # fmt: skip
def test_everything_cut_off_or_empty_goes_on_with_a_warning(more, warning, toy):
    token = make_tokenizer().convert_tokens_to_ids("a" if more else "<|im_end|>")

    def always(logits, uniforms, *args, **kwargs):
        return torch.full(uniforms.shape, token), torch.zeros(uniforms.shape)

    name = "cut_off" if more else "empty"
    process = toy.run(name, *more, plant=lambda: setattr(groups, "sample_tokens", always))
    assert process.wait() == 0, process.text()
    assert f"step 0: alarm: {warning}" in process.text()
    assert {
        row["completion"] for row in lines(toy.path(name) / "completions/step_00005.jsonl")
    } == {"a" if more else ""}


def test_a_second_process_is_refused_while_one_runs(toy, straight):
    reading, writing = os.pipe()

    def wait_for_the_other():
        original = main.evaluate_policy

        def evaluate(*args, **kwargs):
            os.write(writing, b"x")
            time.sleep(2)
            return original(*args, **kwargs)

        main.evaluate_policy = evaluate

    first = toy.run("shared", plant=wait_for_the_other)
    assert os.read(reading, 1) == b"x"
    second = Process(toy.argv("shared", "--resume"), toy.folder / "second.log")
    assert second.wait() == 2
    assert "another process is running in it" in second.text()
    assert first.wait() == 0, first.text()
    assert_same_run(toy.path("shared"), straight[0])
