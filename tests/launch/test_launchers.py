"""main.py as torchrun and accelerate launch start it: real launchers, processes and signals."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from toys import flags_of

from utils import read_jsonl

pytestmark = pytest.mark.faults
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2")
REWARDS = """
import os
import time

def patient(completion, problem):
    time.sleep({seconds})
    return len(completion) % 5 / 4

def spiteful(completion, problem):
    steps = os.path.exists({metrics!r}) and len(open({metrics!r}).readlines())
    if steps == 2 and os.environ.get("RANK") == "1":
        raise RuntimeError("enough")
    return 0.0

REWARD_FUNCTIONS = [patient, spiteful]
"""


@pytest.fixture
def run(saved_models, tmp_path):
    """run(launcher, ...) starts a toy run in tmp_path/run."""
    processes = []

    def start(launcher, *more, seconds=0.0, spite=False, resume=False):
        metrics = str(tmp_path / "run" / "metrics.jsonl") if spite else "/nowhere"
        rewards = tmp_path / "rewards.py"
        rewards.write_text(REWARDS.format(seconds=seconds, metrics=metrics))
        flags = (*flags_of(saved_models, tmp_path / "run"), "--evaluator", rewards)
        flags = ("--resume", "--output_dir", tmp_path / "run") if resume else flags
        process = subprocess.Popen(
            [*launcher, str(ROOT / "main.py"), *map(str, flags), *map(str, more)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
        processes.append(process)
        return process

    start.path = tmp_path / "run"
    yield start
    for process in processes:
        process.kill()


def steps(path):
    return [row["step"] for _, row in read_jsonl(path / "metrics.jsonl")]


@pytest.mark.parametrize(
    "launcher", [TORCHRUN, (*ACCELERATE, "--multi_gpu")], ids=["torchrun", "accelerate"]
)
def test_the_launchers_start_processes_that_see_each_other(launcher, run):
    """accelerate launch needs --multi_gpu also on a CPU: with --cpu it starts a single process."""
    output, _ = (process := run(launcher)).communicate(timeout=300)
    assert process.returncode == 0, output
    assert output.count("The report, to open in a browser") == 1
    assert steps(run.path) == [0, 1, 2]


def test_a_signal_saves_the_last_completed_step_and_the_run_goes_on(run):
    process = run(TORCHRUN, "--num_train_iters", 50, "--save_steps", 0, seconds=0.05)
    deadline = time.monotonic() + 120
    while not (run.path / "metrics.jsonl").exists() or len(steps(run.path)) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert "interrupted by SIGTERM; step " in output and "; to go on: --resume" in output
    [saved] = (run.path / "checkpoints").iterdir()
    done = len(steps(run.path))
    assert saved.name == f"step_{done:05d}" and done >= 3
    more = ("--num_train_iters", done + 2)
    output, _ = run(TORCHRUN, *more, seconds=0.05, resume=True).communicate(timeout=300)
    assert f"going on from {saved}" in output
    assert steps(run.path) == list(range(done + 2))


def test_a_failing_process_ends_all_with_its_own_message_and_no_step_is_lost(run):
    process = run(TORCHRUN, spite=True)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    lines = [line for line in output.splitlines() if "main.py: error" in line]
    [line] = [line for line in lines if "another process" not in line]
    assert "reward function spiteful raised RuntimeError: enough" in line
    assert line.endswith("(process 1)")
    assert [path.name for path in (run.path / "checkpoints").iterdir()] == ["step_00002"]
