"""Checkpoints, --resume, signals and limits. The long campaign is in test_faults.py."""

import os
import re
import shutil
import signal
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model
from faults import (
    INTERVAL,
    MOVING,
    Toy,
    assert_same_run,
    kill_and_resume,
    operations,
    signal_in,
)
from toys import equal, move, resuming, saver_of
from transformers import AutoModelForCausalLM

from launch.interrupts import only_process_in
from launch.parser import parse_args
from llms import frozen_copy
from records import checkpoints
from records.checkpoints import checkpoint_to_resume, checkpoints_in
from records.run import Run
from training.progress import phase
from utils import Stopped, TimedOut, UserError, time_limit


@pytest.fixture(scope="module")
def toy(saved_models, tmp_path_factory):
    return Toy(tmp_path_factory.mktemp("toy"), saved_models["qwen2"])


# --- what a checkpoint holds ---------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_brings_back_weights_moments_and_reference_and_is_a_model(tied, tmp_path):
    def model(seed):
        return make_model(seed=seed, tie_word_embeddings=tied)

    saver = saver_of(tmp_path, model(0), frozen_copy(model(1)))
    move(saver)
    saver.save()
    start = checkpoint_to_resume(resuming(tmp_path))
    again = saver_of(tmp_path, model(2), frozen_copy(model(3)), start)
    assert again.done == 1
    assert equal(again.policy, saver.policy) and equal(again.reference, saver.reference)
    head, embedding = again.policy.get_output_embeddings(), again.policy.get_input_embeddings()
    assert (head.weight is embedding.weight) == tied
    assert equal(AutoModelForCausalLM.from_pretrained(start.path), saver.policy)
    for either in (saver, again):
        move(either)  # from the same moments
    assert equal(again.policy, saver.policy)


def test_older_checkpoints_go_once_a_newer_one_is_read_back_whole(tmp_path, monkeypatch):
    saver = saver_of(tmp_path)
    for _ in range(3):
        move(saver)
        saver.save()
    assert [step for step, _ in checkpoints_in(saver.folder)] == [3, 2]
    monkeypatch.setattr(checkpoints, "damage", lambda path: "model.safetensors was changed")
    move(saver)
    with pytest.raises(UserError, match=r"read back, model\.safetensors was changed; step_00003"):
        saver.save()
    assert [step for step, _ in checkpoints_in(saver.folder)] == [4, 3, 2]


def test_too_little_room_is_said_in_bytes_and_nothing_is_written(tmp_path, monkeypatch):
    saver = saver_of(tmp_path, reference=frozen_copy(make_model()))
    move(saver)
    saver.save()
    move(saver)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1234))
    parameters = list(saver.policy.parameters())
    # policy, reference and two moments, and a count of steps, 4 bytes, for each parameter
    needed = 4 * sum(p.nbytes for p in parameters) + 4 * len(parameters) + checkpoints.SMALL_FILES
    with pytest.raises(UserError, match=f"needs {needed:,} bytes of disk, 1,234 are free; step_0"):
        saver.save()
    assert [path.name for path in saver.folder.iterdir()] == ["step_00001"]


# --- finding one again ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A run with the checkpoints of steps 1, 2 and 3."""
    path = tmp_path_factory.mktemp("three")
    saver = saver_of(path)
    for _ in range(3):
        move(saver)
        saver._save(prune=False)
    return path


def flip(path, place=0.5):
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 1
    path.write_bytes(data)


MUTATIONS = {
    "a flipped bit": lambda folder: flip(folder / "model.safetensors"),
    "a file cut off": lambda folder: os.truncate(folder / "optimizer.pt", 1000),
    "a file missing": lambda folder: (folder / "config.json").unlink(),
    "another step's file": lambda folder: shutil.copy(
        folder.parent / "step_00001" / "optimizer.pt", folder
    ),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "an edited manifest": lambda folder: (folder / "manifest.json").write_text(
        (folder / "manifest.json").read_text().replace('"seed": 1', '"seed": 2')
    ),
    "another step's name": lambda folder: folder.rename(folder.with_name("step_00007")),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(name, three, tmp_path, capsys):
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "checkpoints"
    MUTATIONS[name](folder / "step_00003")
    assert checkpoint_to_resume(resuming(tmp_path)).step == 2
    assert re.search(r"step_0000[37] is passed over: \S", capsys.readouterr().err)
    for step in (1, 2):
        flip(folder / f"step_0000{step}" / "model.safetensors")
    with pytest.raises(UserError, match="no whole checkpoint is left"):
        checkpoint_to_resume(resuming(tmp_path))


def test_the_one_named_is_used_and_a_run_without_any_starts_from_the_beginning(three, tmp_path):
    named = resuming(three, str(three / "checkpoints" / "step_00002"))
    assert checkpoint_to_resume(named).step == 2
    assert checkpoint_to_resume(resuming(tmp_path)) is None
    with pytest.raises(UserError, match=r"--num_train_iters 2: .*step_00003 has done more steps"):
        checkpoint_to_resume(resuming(three, num_train_iters=2))
    with pytest.raises(UserError, match=r"other flags: --learning_rate \(was 0.001\); "):
        checkpoint_to_resume(resuming(three, learning_rate=0.5))


# --- the flags of a resumed run ------------------------------------------------------------------


def test_a_run_is_resumed_with_its_own_flags_and_others_are_refused(toy, tmp_path, capsys):
    args = parse_args(toy.argv("flags", "--reward_weights", "variety=2"))
    run = Run(toy.path("flags"))
    run.save_config(args, "cpu")
    here = ["--output_dir", str(run.path)]
    checkpoint = run.path / "checkpoints" / "step_00002"
    checkpoint.mkdir(parents=True)
    for argv in (["--resume", *here], ["--resume", str(run.path)], ["--resume", str(checkpoint)],
                 toy.argv("flags", "--resume")):  # fmt: skip
        again = vars(parse_args(argv))
        assert again.pop("resume") and again.pop("output_dir") == str(run.path)
        assert again == {k: v for k, v in vars(args).items() if k in again}
    assert parse_args(["--resume", *here, "--num_train_iters", "99"]).num_train_iters == 99
    other = ["--resume", str(run.path), "--output_dir", str(tmp_path / "other")]
    for argv, reason in (
        (["--resume", *here, "--seed", "3", "--kl_beta", "0.5"],
         r"--resume: the run has other flags: --seed \(was 7111994\), --kl_beta \(was 0.05\); "),
        (toy.argv("flags"), "--output_dir .* is not empty; go on with the run in it by --resume"),
        (["--resume"], "--resume: which run"),
        (["--resume", "nowhere"], "--resume nowhere: no such directory"),
        (other, "--output_dir .* is of another run"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            parse_args(argv)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1
        assert re.search(reason, error), error
        assert len(error.replace(str(toy.folder), "").replace(str(tmp_path), "")) <= 201


def test_one_process_has_a_directory_and_a_refused_one_leaves_none(tmp_path):
    run = tmp_path / "runs" / "one"
    with only_process_in(run):
        with pytest.raises(
            UserError, match=r"--output_dir .*one: another process is running in it"
        ):
            with only_process_in(run):
                pass
        (run / "config.json").write_text("{}")
    with only_process_in(run):
        pass
    assert (run / "config.json").exists()
    with pytest.raises(UserError, match="no such reward"), only_process_in(tmp_path / "two"):
        raise UserError("no such reward")
    assert not (tmp_path / "two").exists()


# --- limits --------------------------------------------------------------------------------------


def test_a_call_that_hangs_is_ended_even_where_it_swallows_what_ends_it():
    started = time.monotonic()
    with pytest.raises(TimedOut), time_limit(0.05):
        time.sleep(60)
    with pytest.raises(TimedOut), time_limit(0.05), suppress(TimedOut):
        time.sleep(60)
    assert 0.1 <= time.monotonic() - started < 30
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    with time_limit(0.01):
        pass
    time.sleep(0.02)  # nothing fires any more


@pytest.mark.parametrize(
    ("name", "flag"),
    [("sampling", "--questions_per_step"), ("policy", "--micro_batch_tokens"),
     ("evaluation", "--eval_batch_size"), ("loading", "--plan"),
     ("playing", "--questions_per_step"), ("referee", "--micro_batch_tokens")],
)  # fmt: skip
def test_memory_that_is_full_names_the_phase_and_the_flag_to_lower(name, flag):
    def allocate():
        torch.empty(2**60, dtype=torch.uint8)

    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def python():
        raise MemoryError

    for full in (allocate, fail, python):
        with pytest.raises(UserError, match=rf"out of memory \({name}\): .*{flag}"), phase(name):
            full()
    with pytest.raises(RuntimeError, match="size"), phase(name):
        torch.ones(2) @ torch.ones(3)


def test_three_skipped_updates_in_a_row_end_a_run_and_what_it_had_is_kept(tmp_path):
    saver = saver_of(tmp_path)
    with pytest.raises(UserError, match=r"not finite in 3 steps in a row.*step_00001 is whole"):
        with saver:
            move(saver)
            saver.save()
            for done, skipped in ((2, 1), (3, 1), (4, 0), (5, 1), (6, 0.5), (7, 1)):
                saver.completed(done, skipped)
    assert [step for step, _ in checkpoints_in(saver.folder)] == [7, 1]


def test_a_signal_waits_while_weights_are_of_no_step_and_no_longer(tmp_path):
    saver = saver_of(tmp_path)
    with pytest.raises(Stopped), saver:
        move(saver)
        for parameter in saver.policy.parameters():
            parameter.grad = torch.ones_like(parameter)
        saver.optimizer.step()
        os.kill(os.getpid(), signal.SIGTERM)
        moved = [p.clone() for p in saver.policy.parameters()]
        saver.completed(2)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    start = checkpoint_to_resume(resuming(tmp_path))
    assert start.step == 2
    again = saver_of(tmp_path, make_model(seed=2), start=start)
    assert all(torch.equal(p, q) for p, q in zip(again.policy.parameters(), moved))
    with pytest.raises(KeyError), saver_of(tmp_path, start=start) as saver:
        saver.optimizer.step()
        raise KeyError  # in the middle of an update: what is in memory is not step 2
    assert [step for step, _ in checkpoints_in(saver.folder)] == [2]


# --- whole runs ----------------------------------------------------------------------------------


def test_a_killed_run_goes_on_and_ends_like_one_that_was_not(toy):
    """Killed in the middle of its second checkpoint."""
    number = operations(toy, "straight").index("written /checkpoints/step_00004.new/optimizer.pt")
    kill_and_resume(toy, toy.path("straight"), number)


def test_with_a_reference_that_moves_too(toy):
    assert toy.run("moving", *MOVING).wait() == 0
    status, _, process = signal_in(
        toy, "stopped", "policy", signal.SIGINT, call=7, delay=0.05, more=MOVING
    )
    assert status == 130, process.text()
    assert "--resume --output_dir" in process.text().splitlines()[-1]
    again = toy.run("stopped", *MOVING, "--resume")
    assert again.wait() == 0
    assert again.resumed_at() % INTERVAL == 1  # no step lost, where no checkpoint was due
    assert_same_run(toy.path("stopped"), toy.path("moving"))
