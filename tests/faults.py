"""Toy runs in processes of their own, so that tests may kill them, signal them and plant faults.

A process is forked after torch is imported: a run of a few steps takes less than a second. Whatever
is planted is planted there, from here: the code under test knows nothing of it.
"""

import functools
import hashlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import transformers.modeling_utils

import evaluator
import main
import records.run
from launch import interrupts, loading
from launch.parser import parse_args
from records import checkpoints
from sampling import groups
from training import update

STEPS, INTERVAL = 6, 2
TOY = [
    "--preset", "cpu", "--dataset_name", "gsm8k", "--questions_per_step", "2", "--group_size", "3",
    "--max_completion_length", "8", "--max_prompt_length", "400", "--num_train_iters", str(STEPS),
    "--save_steps", str(INTERVAL), "--eval_iterations", "3", "--cold_start_steps", "1",
    "--learning_rate", "0.01", "--kl_beta", "0.05", "--num_inner_epochs", "2",
    "--short_eval_iterations", "0", "--precision", "fp32",
]  # fmt: skip
MOVING = ["--update_ref_model", "--update_ref_model_freq", "1"]


def variety(completion, problem):
    return len(set(completion)) / 8


class Toy:
    """A directory with data and model, and the commands of runs on them."""

    def __init__(self, folder, model):
        self.folder, self.model = Path(folder), model
        (self.folder / "runs").mkdir()  # or the first run would make it, an operation more
        for split, count in (("train", 12), ("test", 3)):
            rows = [
                {"question": f"{i} + 1?", "answer": f"{i} + 1 = {i + 1} #### {i + 1}"}
                for i in range(count)
            ]
            (self.folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def path(self, name):
        return self.folder / "runs" / name

    def argv(self, name, *more):
        data = ["--dataset_path", str(self.folder), "--model_name", str(self.model)]
        return [*TOY, *data, "--output_dir", str(self.path(name)), *more]

    def run(self, name, *more, plant=None):
        """Start a run, after plant() in its process. Returns the Process."""
        return Process(self.argv(name, *more), self.folder / f"{name}.log", plant)


class Process:
    """`python main.py ARGV`, forked; `log` gets what it writes."""

    def __init__(self, argv, log, plant=None):
        self.log = Path(log)
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                for stream in (sys.stdout, sys.stderr):
                    stream.flush()
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
                sys.stdout = sys.stderr = os.fdopen(descriptor, "w", buffering=1)
                torch.set_num_threads(1)
                evaluator.REWARD_FUNCTIONS[:] = [variety]
                records.run.plot_run = records.run.write_report = lambda *_: None
                loading.warn = lambda *_: None
                interrupts.exit_on_signals()
                if plant:
                    plant()
                code = main.command(parse_args(argv))
            except SystemExit as stop:
                code = stop.code
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)

    def wait(self, seconds=1000):
        """The exit status, negative for the signal that killed it."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                self.cpu = usage.ru_utime + usage.ru_stime
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise TimeoutError(f"still running after {seconds} s: {self.text()}")

    def cpu_so_far(self):
        """Seconds of the processor that it has had."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def text(self):
        return self.log.read_text()

    def resumed_at(self):
        """The step at which a resumed run went on."""
        lines = [line for line in self.text().splitlines() if line.startswith("going on from ")]
        return int(lines[0].rpartition("_")[2]) if lines else 0


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def weights(run):
    """The SHA-256 of a finished run's model or adapter."""
    [file] = (run / "model").glob("*model.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def assert_same_run(run, straight):
    """Every step once, and the weights of the run that nothing interrupted."""
    assert weights(run) == weights(straight)
    for name in ("metrics.jsonl", "eval.jsonl"):
        ours, theirs = (
            [{k: v for k, v in row.items() if "second" not in k} for row in lines(path / name)]
            for path in (run, straight)
        )
        assert ours == theirs, name
    names = [sorted(file.name for file in (path / "completions").iterdir())
             for path in (run, straight)]  # fmt: skip
    assert names[0] == names[1]


# --- SIGKILL at every file operation -------------------------------------------------------------

OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link")


def watch_files(root, seen):
    """Call seen(what, path) before every file operation of this process that changes `root`, and
    once the bytes of a file are written but not yet on the disk."""
    root = str(root)

    def audit(event, arguments):
        if event not in OPERATIONS:
            return
        path = arguments[0]
        path = os.fspath(path) if isinstance(path, str | os.PathLike) else ""
        writes = event != "open" or bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        # What rmtree removes it names relative to an open directory.
        if writes and (path.startswith(root) or (path and not path.startswith("/"))):
            seen(event, path)

    sys.addaudithook(audit)

    def after(owner, name, path_of):
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapper(*args, **kwargs):
            result = original(*args, **kwargs)
            seen("written", str(path_of(*args)))
            return result

        setattr(owner, name, wrapper)

    fsync = os.fsync

    def watched_fsync(descriptor):
        seen("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    os.fsync = watched_fsync
    after(transformers.modeling_utils, "safe_save_file", lambda tensors, path: path)
    after(checkpoints, "save_model", lambda model, path: path)
    after(torch, "save", lambda value, file: file.name)
    after(records.run, "write_jsonl", lambda path, rows: path)


def plant_list_of_operations(root, target):
    """Write what every operation of the run is to `target`, one a line."""

    def plant():
        file = open(target, "w", buffering=1)  # noqa: SIM115
        watch_files(root, lambda what, path: file.write(f"{what} {path.removeprefix(str(root))}\n"))

    return plant


def tear(path):
    """Leave half of a file, or of its last line: what was not on the disk yet when it went dark."""
    size = os.path.getsize(path)
    lost = open_lines(Path(path))[-1:] if path.endswith(".jsonl") else []
    os.truncate(path, size - len(lost[0].encode()) // 2 if lost else size // 2)


def plant_kill(root, number):
    """SIGKILL at the run's file operation of that number, the file at hand torn."""
    count = iter(range(10**6))

    def seen(what, path):
        if next(count) == number:
            if what in ("fsync", "written") and os.path.isfile(path):
                tear(path)
            os.kill(os.getpid(), signal.SIGKILL)

    return lambda: watch_files(root, seen)


def operations(toy, name, *more):
    """Every file operation of a run, in its order."""
    target = toy.folder / f"{name}.operations"
    assert toy.run(name, *more, plant=plant_list_of_operations(toy.path(name), target)).wait() == 0
    return target.read_text().splitlines()


def kill_and_resume(toy, straight, number, *more, base=None):
    """Kill a run (of `base`, the one that goes on from that directory) at an operation, go on, and
    check that no more is lost than one interval of saving, and in the end nothing."""
    name = f"killed{number}{'again' if base else ''}"
    run = toy.path(name)
    if base:
        shutil.copytree(base, run)
        more = (*more, "--resume_or_start")
    killed = toy.run(name, *more, plant=plant_kill(run, number))
    assert killed.wait() == -signal.SIGKILL, f"{number}: {killed.text()}"
    logged = sum(line.endswith("\n") for line in open_lines(run / "metrics.jsonl"))
    resumed = toy.run(name, *more, "--resume_or_start")
    assert resumed.wait() == 0, resumed.text()
    assert logged - resumed.resumed_at() <= INTERVAL
    assert_same_run(run, straight)
    shutil.rmtree(run)


def open_lines(path):
    return path.read_text().splitlines(keepends=True) if path.exists() else []


# --- signals in a phase --------------------------------------------------------------------------

PHASES = {  # a function that each calls
    "loading": (loading, "load"),
    "cold start": (main, "cold_start"),
    "sampling": (groups, "sample_rollouts"),
    "rewards": (main, "score"),
    "policy": (update, "grpo_loss"),
    "evaluation": (main, "evaluate_policy"),
    "saving": (torch, "save"),
}


def signal_in(toy, name, phase, number, call=1, pause=0.1, delay=0.0, more=(), twice=False):
    """Start a run, send it a signal `delay` seconds after the call of a phase's function began,
    which lasts `pause` seconds longer than it would. Returns (exit status, seconds of the processor
    that it went on for, Process): other processes on the machine do not count."""
    reading, writing = os.pipe()
    owner, function = PHASES[phase]

    def plant():
        original = getattr(owner, function)
        calls = iter(range(1, 10**6))

        def wrapper(*args, **kwargs):
            if next(calls) == call:
                os.write(writing, b"x")
                time.sleep(pause)
            return original(*args, **kwargs)

        setattr(owner, function, wrapper)

    process = toy.run(name, *more, plant=plant)
    os.close(writing)
    assert os.read(reading, 1) == b"x", process.text()
    os.close(reading)
    time.sleep(delay)
    before = process.cpu_so_far()
    os.kill(process.pid, number)
    if twice:
        time.sleep(0.1)
        os.kill(process.pid, number)
    status = process.wait()
    return status, process.cpu - before, process
