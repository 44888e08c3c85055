"""Short evaluations: a curve between those that decide, and nothing else."""

import json
import shutil
from types import SimpleNamespace

import pytest
from conftest import make_args
from test_main import TINY
from toys import write_run

import main
from evaluation.held_out import an_eighth
from launch.parser import parse_args
from launch.planner import count_evaluations
from records.budget import how_long
from records.files import AN_EIGHTH, BEFORE_COLD_START, Mean, Series
from records.plots import plot_run
from records.report import write_report


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def short(saved_models, tmp_path_factory):
    """A run of three steps that looks at three of 17 problems after each, and one that does not."""
    folder = tmp_path_factory.mktemp("short")
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr("records.run.plot_run", lambda path: path / "plots")
    for every in (0, 1):
        argv = [*TINY, "--model_name", str(saved_models["qwen2"]), "--num_train_iters", "3",
                "--eval_problems", "17", "--short_eval_iterations", str(every),
                "--output_dir", str(folder / str(every))]  # fmt: skip
        main.train(parse_args(argv))
    monkeypatch.undo()
    return folder


def test_a_short_evaluation_is_of_every_eighth_problem():
    assert an_eighth(list(range(17))) == [0, 8, 16]
    assert an_eighth([5]) == [5]


def test_they_stand_before_the_cold_start_and_between_evaluations_and_agree_with_these(short):
    found = rows(short / "1" / "short_eval.jsonl")
    assert [(row["step"], row.get("before_cold_start", False)) for row in found] == [
        (0, True), (0, False), (1, False), (2, False), (3, False)
    ]  # fmt: skip
    assert all(row["problems"] == 3 for row in found)
    for step, row in ((0, found[1]), (3, found[-1])):
        answers = rows(short / "1" / "completions" / f"eval_{step:05d}.jsonl")[::8]
        assert row["accuracy"] == sum(answer["correct"] for answer in answers) / 3
        assert "seconds/evaluation" not in row  # these answers were counted there
    assert [row["step"] for row in rows(short / "1" / "eval.jsonl")] == [0, 3]
    assert not (short / "0" / "short_eval.jsonl").exists()


def test_they_change_nothing_that_is_trained(short):
    first, second = (short / every / "model" / "model.safetensors" for every in "01")
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.slow
def test_a_resumed_run_makes_those_after_its_step_again_once(short, saved_models, tmp_path):
    argv = [*TINY, "--model_name", str(saved_models["qwen2"]), "--num_train_iters", "2",
            "--eval_problems", "17", "--short_eval_iterations", "1", "--lr_schedule", "constant",
            "--output_dir", str(tmp_path / "run")]  # fmt: skip
    main.train(parse_args(argv))
    file = tmp_path / "run" / "short_eval.jsonl"
    with file.open("a") as late:  # what a run that was killed may have left behind
        late.write('{"step": 3, "accuracy": 0.9}\n{"step": 4, "accur')
    more = ["--resume", "--output_dir", str(tmp_path / "run"), "--num_train_iters", "3"]
    main.train(parse_args(more))
    assert [row["step"] for row in rows(file)] == [0, 0, 1, 2, 3]
    assert rows(file)[-1]["accuracy"] != 0.9


@pytest.mark.slow
def test_a_run_that_starts_over_does_not_look_twice_before_its_cold_start(saved_models, tmp_path):
    """It was stopped before its first checkpoint, with its evaluations of step 0 in their files."""
    argv = [*TINY, "--model_name", str(saved_models["qwen2"]), "--num_train_iters", "1",
            "--eval_problems", "17", "--short_eval_iterations", "1",
            "--output_dir", str(tmp_path / "run")]  # fmt: skip
    main.train(parse_args(argv))
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    main.train(parse_args(["--resume", "--output_dir", str(tmp_path / "run")]))
    found = rows(tmp_path / "run" / "short_eval.jsonl")
    assert [(row["step"], "before_cold_start" in row) for row in found] == [
        (0, True), (0, False), (1, False)
    ]  # fmt: skip


def test_the_curve_is_in_the_figure_and_on_the_page(tmp_path):
    write_run(tmp_path, {})
    lines = [{"step": 0, "accuracy": 0.0, "before_cold_start": True}]
    lines += [{"step": step, "accuracy": step / 8} for step in (0, 2, 4)]
    (tmp_path / "short_eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    evaluation = {"accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6, "problems": 32}
    (tmp_path / "eval.jsonl").write_text(
        "".join(json.dumps({"step": step, **evaluation}) + "\n" for step in (0, 4))
    )
    run = Series(tmp_path)
    assert run.short_accuracy == {
        BEFORE_COLD_START: ([0], [0.0]), AN_EIGHTH: ([0, 2, 4], [0.0, 0.25, 0.5])
    }  # fmt: skip
    assert Mean("", [run, run]).short_accuracy == run.short_accuracy
    page = write_report(tmp_path).read_text()
    assert AN_EIGHTH in page and BEFORE_COLD_START in page
    assert (plot_run(tmp_path) / "eval_accuracy.png").stat().st_size > 10_000


def test_plan_and_estimate_count_them_as_eighths():
    args = make_args(num_train_iters=20, eval_iterations=0, short_eval_iterations=4)
    assert count_evaluations(SimpleNamespace(**vars(args) | {"cold_start_steps": 0})) == 2.5
    assert count_evaluations(SimpleNamespace(**vars(args) | {"cold_start_steps": 3})) == 2.625
    past = {"evaluation": (6400.0, {"answers": 64, "tokens": 640}),
            "cold start": (0.64, {"steps": 4, "tokens": 640})}  # fmt: skip
    flags = {"questions_per_step": 1, "group_size": 2, "num_inner_epochs": 1, "eval_iterations": 0}
    times = [how_long(SimpleNamespace(**flags, short_eval_iterations=every), 9, past)
             for every in (0, 4)]  # fmt: skip
    # Nine steps of 200 s and an evaluation of 6,400; two short ones are 1,600 more.
    assert ["2.3 h" in times[0], "2.7 h" in times[1]] == [True, True]
