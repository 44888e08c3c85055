"""The calculator: a task whose world replies; and what becomes of replies that fail."""

import ast
import json
import operator
import re
import shutil
import time
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import pytest
from conftest import make_args, make_setup
from several import launch

import main
import tasks
from evaluation.reward_lint import report_of_problems
from launch.parser import parse_args
from rldatasets import Problem
from sampling.turns import replies
from tasks import calculator, load_task
from tasks.calculator import CALLS, UNREADABLE, reply
from tasks.guarded import LONGEST_REPLY
from utils import UserError

PROBLEM = Problem("?", "84", "12 * 7")


def args_of(name, **more):
    return SimpleNamespace(dataset_name=name, dataset_path=None, difficulty=1, evaluator=None,
                           seed=0, **more)  # fmt: skip


@pytest.fixture(scope="module")
def task():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calculator, "SIZES", {"train": 60, "test": 40})
        made = load_task(args_of("calculator"))
        found = {split: list(made.problems(split)) for split in ("train", "test")}
    return replace(made, problems=found.get)


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        ("<calculator>12 * 7</calculator>", "84"), ("<calculator>1 / 3</calculator>", "0.3333"),
        ("<calculator>(2 - 5) * 2</calculator>", "-6"), ("<calculator>5 / 2</calculator>.", "2.5"),
        ("I ask:\n<calculator>\n6×7\n</calculator> <answer>9</answer>", "42"),
        ("<calculator>2</calculator><calculator>3</calculator>", "2"),
        ("<calculator>7 / 0</calculator>", UNREADABLE), ("<calculator></calculator>", UNREADABLE),
        ("<calculator>__import__('os').system('x')</calculator>", UNREADABLE),
        ("<calculator>9 ** 9 ** 9</calculator>", UNREADABLE),
        ("<answer>84</answer>", None), ("<calculator>12 * 7", None), ("", None),
    ],
)  # fmt: skip
def test_a_call_is_answered_with_its_value_and_anything_else_ends_the_episode(turn, said):
    assert reply(PROBLEM, (turn,)) == said


def test_calls_have_an_end():
    call = "<calculator>1</calculator>"
    for n in range(1, CALLS + 2):
        turns = (call, "1") * (n - 1) + (call,)
        assert (reply(PROBLEM, turns) is None) == (n > CALLS)


def value(node):
    """What a calculation comes to, by Python's own parser."""
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    kinds = {ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "truediv"}
    return getattr(operator, kinds[type(node.op)])(value(node.left), value(node.right))


def test_problems_are_calculations_in_one_split_alone_with_whole_answers(task):
    solutions = {split: {p.solution for p in task.problems(split)} for split in ("train", "test")}
    assert not solutions["train"] & solutions["test"]
    for problem in [*task.problems("train"), *task.problems("test")]:
        assert value(ast.parse(problem.solution, mode="eval").body) == int(problem.answer) > 0
        numbers = sorted(re.findall("[0-9]+", problem.question))
        assert numbers == sorted(re.findall("[0-9]+", problem.solution))


def test_the_worked_answer_shows_a_call_and_earns_all(task):
    problem = task.problems("test")[0]
    worked = task.worked_answer(problem)
    call, result, answer = worked.turns
    assert call == f"<calculator>{problem.solution}</calculator>"
    assert result == problem.answer and answer == worked == f"<answer>{problem.answer}</answer>"
    assert [f(worked, problem) for f in task.reward_functions] == [2.0, 0.5]
    text, complaints = report_of_problems(task, task.problems("test"), {}, 10.0)
    assert complaints == 0, text


# --- replies that fail ---------------------------------------------------------------------------

ECHO = """
from rldatasets import Problem

def problems(split, seed):
    return [Problem(f"{n}{split}?", str(n), "") for n in range(12)]

def reply(problem, turns):
    %s

def talkative(completion, problem):
    return len(completion.turns) + len(completion) / 100

REWARD_FUNCTIONS = [talkative]
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A task `own` with this reply."""
    monkeypatch.setattr(tasks, "TASKS", tmp_path)

    def made(body):
        (tmp_path / "own.py").write_text(ECHO % body)
        return load_task(args_of("own"))

    yield made
    tasks.sys.modules.pop("tasks.own", None)


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("return 1 / 0", r"own\.py:8: ZeroDivisionError: division by zero; mend this line"),
        ("return 7", r"own\.py: reply returned 7, neither text nor None, for '0train\?'"),
        ("return exit()", r"own\.py:8: SystemExit: None; mend this line"),
    ],
)
def test_a_reply_that_fails_names_file_and_line(body, complaint, own):
    task = own(body)
    with pytest.raises(UserError, match=complaint):
        task.reply(task.problems("train")[0], ("a",))


def test_a_reply_is_bare_and_never_longer_than_a_turn_may_be(own):
    task = own("return '  x ' + 'y' * 10**7")
    said = task.reply(PROBLEM, ("a",))
    assert said.startswith("x y") and len(said) <= LONGEST_REPLY


def test_a_reply_in_which_time_stands_still_is_told(own):
    task = own("import time; time.sleep(60)")
    setup = make_setup(None, make_args(reward_timeout=0.1), task=task)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"reply took more than --reward_timeout 0\.1 seconds"):
        replies(setup, [PROBLEM])(0, ("a turn",))
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("code", ["reply = 7", "def reply(problem):\n    pass"])
def test_what_is_no_reply_is_refused(code, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "TASKS", tmp_path)
    (tmp_path / "own.py").write_text((ECHO % "pass").partition("def reply")[0] + code)
    with pytest.raises(UserError, match=r"own\.py:7: reply (is no function|does not take)"):
        load_task(args_of("own"))


def test_the_paged_sampler_is_refused_before_a_model_loads(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(["--preset", "cpu", "--dataset_name", "calculator", "--sampler", "paged"])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "--sampler paged: cannot go on after" in message
    assert len(message) <= 201


# --- whole runs ----------------------------------------------------------------------------------


def weights(run):
    return (run / "model" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_runs_of_episodes_resume_exactly_and_two_processes_do_what_one_does(
    own, saved_models, tmp_path, monkeypatch
):
    own("return str(len(turns[-1])) if len(turns) < 4 else None")
    monkeypatch.setattr("records.run.write_report", lambda path: None)

    def train(name, *more):
        main.train(parse_args([
            "--preset", "cpu", "--dataset_name", "own", "--model_name", str(saved_models["qwen2"]),
            "--output_dir", str(tmp_path / name), "--questions_per_step", "4", "--group_size", "4",
            "--num_train_iters", "4", "--cold_start_steps", "0", "--eval_problems", "4",
            "--max_completion_length", "90", "--learning_rate", "1e-3", "--save_steps", "2",
            "--keep_checkpoints", "9", "--kl_beta", "0.1", "--stop", *"aeiou4R5EM", *more,
        ]))  # fmt: skip
        return tmp_path / name

    one = train("one")
    rows = [json.loads(row) for row in (one / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["turns"] > 1.5 and rows[0]["tokens/told"] > 0
    assert all(row["mismatch"] < 1e-5 for row in rows)
    before = weights(one)
    completions = (one / "completions" / "step_00003.jsonl").read_text()
    assert '"turns": [' in completions

    shutil.rmtree(one / "model")
    for later in (one / "checkpoints").glob("*3"), (one / "checkpoints").glob("*4"):
        for path in later:
            shutil.rmtree(path)
    assert weights(train("one", "--resume")) == before
    assert (one / "completions" / "step_00003.jsonl").read_text() == completions

    launch(2, lambda: train("two").name)
    assert (tmp_path / "two" / "completions" / "step_00000.jsonl").read_text() == (
        one / "completions" / "step_00000.jsonl"
    ).read_text()
    first = json.loads((tmp_path / "two" / "metrics.jsonl").read_text().splitlines()[0])
    assert rows[0]["reward_std"] > 0 and rows[0]["grad_norm"] > 0
    for name in ("reward", "turns", "tokens/told", "tokens/trained", "grad_norm", "kl", "entropy"):
        assert first[name] == pytest.approx(rows[0][name], rel=1e-4), name
