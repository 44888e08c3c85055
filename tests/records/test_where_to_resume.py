"""Which directories a run goes on in: finished, empty, mistyped and foreign ones."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT
from toys import flags_of

from launch.interrupts import stopped_line
from launch.parser import parse_args
from records.resuming import LATEST, has_finished, run_to_resume
from utils import Stopped, UserError

CPU = ["--preset", "cpu"]


def write_run(path, steps=4, last=4, **flags):
    """A directory with what a run of `steps` steps leaves that has saved its `last` one."""
    args = vars(parse_args([*CPU, "--num_train_iters", str(steps), "--output_dir", str(path)]))
    checkpoint = path / "checkpoints" / f"step_{last:05d}"
    for folder in (checkpoint, path / "model"):
        folder.mkdir(parents=True)
    (checkpoint / "manifest.json").touch()
    (path / "report.html").touch()
    (path / "config.json").write_text(json.dumps({"flags": {**args, **flags}}))
    return path


def resumed(path, *more):
    return parse_args(["--resume", "--output_dir", str(path), *more])


def test_a_finished_run_has_its_last_step_its_model_and_its_report(tmp_path):
    assert has_finished(resumed(write_run(tmp_path / "whole")))
    for name in ("checkpoints/step_00004/manifest.json", "report.html"):
        run = write_run(tmp_path / name.replace("/", "-"))
        (run / name).unlink()
        assert not has_finished(resumed(run))
    run = write_run(tmp_path / "unpublished")
    (run / "model").rmdir()
    assert not has_finished(resumed(run))
    assert not has_finished(resumed(write_run(tmp_path / "stopped", last=3)))
    assert not has_finished(parse_args([*CPU, "--output_dir", str(tmp_path / "new")]))


def test_a_finished_run_goes_on_where_more_is_asked_of_it(tmp_path):
    run = write_run(tmp_path / "run", lora_rank=4)
    assert has_finished(resumed(run))
    assert has_finished(resumed(run, "--resume", str(run / "checkpoints" / "step_00004")))
    assert has_finished(resumed(run, "--merge_lora"))  # its model is whole
    (run / "model" / "adapter_config.json").touch()
    assert not has_finished(resumed(run, "--merge_lora"))
    assert not has_finished(resumed(run, "--num_train_iters", "5"))
    (run / "checkpoints" / "step_00002").mkdir()
    assert not has_finished(resumed(run, "--resume", str(run / "checkpoints" / "step_00002")))


def test_auto_is_the_precision_that_the_run_began_with(tmp_path):
    """As a scheduler has it, which gives the same command again."""
    argv = ["--resume_or_start", "--precision", "auto", *CPU, "--output_dir", str(tmp_path / "run")]
    assert parse_args(argv).precision == "auto"
    write_run(tmp_path / "run", last=3, precision="bf16")
    assert parse_args(argv).precision == "bf16"


@pytest.mark.slow
def test_a_finished_run_is_left_as_it_is_before_torch_is_there(saved_models, tmp_path, command):
    run = tmp_path / "run"
    assert command(*flags_of(saved_models, run, "--cold_start_steps", 0))[0] == 0

    def files():
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in run.rglob("*")}

    before = files()
    look = (
        "import runpy, sys\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    script = f"import sys; sys.argv = {[str(ROOT / 'main.py')]!r} + sys.argv[1:]\n{look}"
    done = subprocess.run(
        [sys.executable, "-c", script, "--resume", "--output_dir", run],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        f"{run} has finished its 3 steps; it goes on where --num_train_iters is raised\n"
    )
    assert files() == before
    status, out, err = command("--resume", "--output_dir", run, "--num_train_iters", 4)
    assert status == 0 and "going on from" in out, err
    assert (run / "checkpoints" / "step_00004").exists()


@pytest.mark.parametrize("mistyped", ["dmeo", "demo1", "demo/", "Demo", "sub/demo"])
def test_a_mistyped_directory_is_refused_and_the_nearest_run_named(
    mistyped, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/gsm8k-qwen", "runs/demo-2", "elsewhere/other", "runs/countdown-smollm2"):
        write_run(tmp_path / name)
    (tmp_path / "runs" / "dmeo-model").mkdir()  # a model, and no run
    (tmp_path / "runs" / "dmeo-model" / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(SystemExit) as stop:
        parse_args([*CPU, "--resume", "--output_dir", f"runs/{mistyped}"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and len(error) <= 201
    assert f"--resume: no run in runs/{mistyped}; the nearest is runs/demo-2; " in error
    assert not (tmp_path / "runs" / mistyped).exists()


def test_a_path_that_is_no_run_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen2"}')
    for place in ("empty", "model"):
        with pytest.raises(UserError, match=rf"--resume {place}: holds no run$"):
            run_to_resume(place, None)
    with pytest.raises(UserError, match=r"--resume: no run in empty; --resume_or_start"):
        run_to_resume("latest", "empty")
    with pytest.raises(UserError, match=r"--resume: model: other files and no run there; name"):
        run_to_resume("latest", "model")
    write_run(tmp_path / "demo")
    with pytest.raises(UserError, match=r"no such directory.*; the nearest is demo$"):
        run_to_resume("dem", None)
    assert run_to_resume("demo", None) == "demo"


def test_a_scheduler_starts_what_is_not_there_and_goes_on_with_what_is(tmp_path):
    new = parse_args([*CPU, "--resume_or_start", "--output_dir", str(tmp_path / "new")])
    assert new.resume == "latest" and new.num_train_iters == 32
    run = write_run(tmp_path / "run", resume_or_start=True)
    again = parse_args([*CPU, "--resume_or_start", "--output_dir", str(run)])
    assert again.num_train_iters == 4 and has_finished(again)
    assert not resumed(run).resume_or_start  # which was said when the run began
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").touch()
    with pytest.raises(SystemExit):
        parse_args([*CPU, "--resume_or_start", "--output_dir", str(tmp_path / "foreign")])


def test_what_a_signal_leaves_is_named_with_its_step_and_place(tmp_path):
    stop = Stopped(2)
    assert "nothing was done yet" in stopped_line(stop, tmp_path)
    for step in (3, 12):
        (tmp_path / "checkpoints" / f"step_{step:05d}").mkdir(parents=True)
    assert stopped_line(stop, tmp_path) == (
        f"main.py: interrupted by SIGINT; step 12 is saved in {tmp_path}/checkpoints/step_00012; "
        f"to go on: --resume --output_dir {tmp_path}"
    )


@pytest.mark.parametrize(
    "place, said",
    [
        ("foreign", "foreign: other files and no run there"),
        ("foreign/notes.txt", "notes.txt: a file and no run there"),
        ("demo/checkpoints", "no run there; the nearest is demo;"),
        ("empty", "no run in empty; --resume_or_start, with a run's flags, begins one"),
        ("damaged", "damaged"),
    ],
)
def test_what_stands_in_place_of_a_run_is_said_and_the_way_out_is_one(
    place, said, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for folder in ("foreign", "demo/checkpoints/step_00001", "empty", "damaged"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "foreign" / "notes.txt").write_text("mine")
    (tmp_path / "damaged" / "config.json").write_text("{")
    with pytest.raises(UserError) as told:
        run_to_resume(LATEST, place)
    assert said in str(told.value)
    assert ("name another directory" in str(told.value)) == (place not in ("empty", "damaged"))
