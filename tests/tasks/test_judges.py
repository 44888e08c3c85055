"""Verifiers in processes of their own: their start is nobody's time, and several work at once."""

import json
import textwrap
import time
from importlib import util
from types import SimpleNamespace

import pytest
import torch
from conftest import TASK, make_args, make_setup

from evaluation.scoring import judged_ahead, score
from launch.loading import start_judge
from rldatasets import Problem
from sampling.rollouts import Rollouts
from tasks import load_task, own_evaluator
from tasks.verifier_process import Judge
from utils import TimedOut, UserError, not_counted, time_limit

SLOW = """
    import time

    time.sleep({start})
    EXAMPLE = ("fine", 0)

    def judge(kind, value):
        if kind == "sleeps":
            time.sleep(value)
        if kind == "hangs":
            while True:
                pass
        if kind == "dies":
            raise SystemExit
        return [kind, value]
"""


@pytest.fixture
def slow_judge(tmp_path, monkeypatch):
    """Call it with the seconds that a start takes."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    judges = []

    def make(start=0.0, seconds=0.2):
        name = f"slow_judge_{len(judges)}"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(SLOW).format(start=start))
        judges.append(Judge(name, seconds))
        return judges[-1]

    yield make
    for judge in judges:
        judge.stop()


# --- the start -----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", ["ValueError", "OSError"])
def test_a_system_without_a_limit_on_memory_has_judges_all_the_same(error, slow_judge, tmp_path):
    """As macOS; sitecustomize is what Python imports first in the other process."""
    (tmp_path / "sitecustomize.py").write_text(
        f"import resource\n\n\ndef fail(*_):\n    raise {error}\n\n\nresource.setrlimit = fail\n"
    )
    assert slow_judge()("fine", 1) == ["fine", 1]


def test_the_start_is_no_part_of_the_time_limit(slow_judge):
    judge = slow_judge(start=0.8)
    with time_limit(0.5):
        assert judge("fine", 1) == ["fine", 1]


@pytest.mark.parametrize("kind", ["hangs", "dies"])
def test_nor_is_the_start_after_a_verdict_that_never_came(slow_judge, kind):
    judge = slow_judge(start=0.8)
    judge.start()
    for value in range(3):
        with time_limit(0.7):
            assert judge(kind, value) is None
        with time_limit(0.5):
            assert judge("fine", value) == ["fine", value]


def test_the_time_that_a_verdict_takes_still_counts(slow_judge):
    judge = slow_judge(start=0.4)
    with pytest.raises(TimedOut), time_limit(0.3):
        judge("sleeps", 0.6)
    with time_limit(0.3):  # and the late verdict answers nobody
        assert judge("fine", 2) == ["fine", 2]
    with time_limit(1.0):
        assert judge("sleeps", 0.6) == ["sleeps", 0.6]


def test_a_clock_that_stood_still_goes_on_with_what_was_left():
    with pytest.raises(TimedOut), time_limit(0.4):
        time.sleep(0.2)
        with not_counted():
            time.sleep(0.6)
        started = time.monotonic()
        time.sleep(1)
    assert 0.05 < time.monotonic() - started < 0.6
    with not_counted():  # without a limit there is none afterwards
        pass
    time.sleep(0.01)


def test_a_verdict_is_remembered(slow_judge):
    judge = slow_judge()
    assert judge("sleeps", 0.3) == ["sleeps", 0.3]
    started = time.monotonic()
    assert judge("sleeps", 0.3) == ["sleeps", 0.3]
    assert time.monotonic() - started < 0.1


# --- side by side --------------------------------------------------------------------------------


def test_four_slow_verdicts_take_as_long_as_one_with_four_processes(slow_judge):
    judge = slow_judge()
    judge.start(4)
    requests = [("sleeps", 0.3 + n / 1000) for n in range(4)]
    started = time.monotonic()
    judge.ahead(requests, 4)
    assert [judge(*request) for request in requests] == [[*request] for request in requests]
    assert time.monotonic() - started < 0.7
    assert len(judge.processes) == 4


def test_each_verdict_is_that_of_its_own_request_whatever_the_order_they_come_in(slow_judge):
    judge = slow_judge()
    requests = [("sleeps", (7 - n) % 5 / 50) for n in range(12)] + [("fine", n) for n in range(20)]
    judge.ahead([*requests, *requests], 3)
    assert len(judge.verdicts) == len(set(requests))
    for request in requests:
        assert judge.verdicts[json.dumps(request)] == [*request]


@pytest.mark.parametrize("kind", ["hangs", "dies"])
def test_what_gets_no_verdict_does_not_hold_up_the_others(slow_judge, kind):
    judge = slow_judge()
    requests = [(kind, 0), *(("fine", n) for n in range(5)), (kind, 1), ("fine", 9)]
    judge.ahead(requests, 2)
    verdicts = [judge.verdicts[json.dumps(request)] for request in requests]
    assert verdicts == [None if request[0] == kind else [*request] for request in requests]


def test_what_takes_longer_than_the_limit_is_left_for_whoever_asks(slow_judge):
    judge = slow_judge()
    started = time.monotonic()
    judge.ahead([("sleeps", 60), ("fine", 1), ("fine", 2)], 2, timeout=0.4)
    assert time.monotonic() - started < 20
    assert [*judge.verdicts] == ['["fine", 1]', '["fine", 2]']
    with pytest.raises(TimedOut), time_limit(0.2):
        judge("sleeps", 60)


def test_a_limit_around_it_ends_it_and_nothing_is_mistaken_for_a_verdict(slow_judge):
    judge = slow_judge()
    judge.start(2)
    with pytest.raises(TimedOut), time_limit(0.2):
        judge.ahead([("sleeps", 0.5), ("sleeps", 0.6)], 2)
    assert judge("fine", 3) == ["fine", 3]


def test_nothing_to_ask_starts_nothing(slow_judge):
    judge = slow_judge()
    judge.ahead([], 4)
    assert judge.processes == []


# --- in a run ------------------------------------------------------------------------------------


def rollouts(texts):
    none = torch.zeros(len(texts), len(texts[0]), 1, dtype=torch.bool)
    return Rollouts([], none.long(), none, none.float(), none[..., 0], texts)


def test_rewards_are_the_same_and_in_order_with_any_number_of_workers(slow_judge):
    scored = {}
    for workers in (1, 3):
        judge = slow_judge()

        def reward(completion, problem, judge=judge):
            return judge("fine", [completion, problem.answer])[1][0].count("a")

        def request(completion, problem):
            return "fine", [completion, problem.answer]

        task = SimpleNamespace(
            **{**vars(TASK), "judge": judge, "judge_request": request, "reward_functions": [reward]}
        )
        args = make_args(reward_workers=workers, reward_timeout=5.0)
        setup = make_setup(None, args, task=task)
        texts, problems = [["a", "aab", ""], ["b", "a", "aaa"]], [Problem("?", "1", "")] * 2
        judged_ahead(rollouts(texts), problems, setup)
        assert len(judge.verdicts) == (0 if workers == 1 else 5)  # "a" is asked about twice
        scored[workers] = score(rollouts(texts), problems, [reward]).total.tolist()
    assert scored[1] == scored[3] == [[1, 2, 0], [0, 1, 3]]


def test_a_task_without_a_judge_needs_no_flag():
    judged_ahead(rollouts([["a"]]), [Problem("?", "1", "")], make_setup(None, SimpleNamespace()))


def test_a_file_says_what_its_judge_is_asked(tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text(
        textwrap.dedent("""
        from urllib import request  # no concern of ours

        from tasks.verifier_process import Judge

        JUDGE = Judge("somewhere")


        def judge_request(completion, problem):
            return (completion,)


        def right(completion, problem):
            return float(JUDGE(completion))


        REWARD_FUNCTIONS = [right]
    """)
    )
    args = SimpleNamespace(
        dataset_name="arithmetic", dataset_path=None, difficulty=1, seed=3, evaluator=str(path)
    )
    task = load_task(args)
    assert task.judge is own_evaluator(str(path))["JUDGE"]
    assert task.judge_request("x", None) == ("x",)
    path.write_text(path.read_text().replace("def judge_request", "judge_request = 3\n\ndef other"))
    with pytest.raises(UserError, match=r"other.py:\d+: judge_request is no function"):
        own_evaluator(str(path.rename(tmp_path / "other.py")))


def test_a_flag_that_does_nothing_says_so_and_a_judge_is_ready_before_it_is_asked(
    slow_judge, capsys
):
    args = SimpleNamespace(reward_workers=2, dataset_name="toy")
    start_judge(TASK, args)
    assert "--reward_workers 2 does nothing" in capsys.readouterr().err
    judge = slow_judge()
    start_judge(SimpleNamespace(judge=judge), args)
    assert len(judge.processes) == 2
    with pytest.raises(UserError, match="--dataset_name toy: the judge of nowhere does not start"):
        start_judge(SimpleNamespace(judge=Judge("nowhere")), args)


def test_what_math_verify_is_asked_ahead_is_what_it_is_asked_later(monkeypatch):
    if not util.find_spec("math_verify"):
        pytest.skip("pip install math-verify==0.9.0 for this test")
    from tasks import math as task

    asked = []
    monkeypatch.setattr(task, "JUDGE", lambda *request: asked.append(request))
    task.equal.cache_clear()
    for gold, answer in (
        (r"\frac{3}{4}", "0.75"), (r"2\sqrt{3}", r"\boxed{\sqrt{12}}"), ("(1, 2)", r"(1,\ 2)"),
        ("72", "73"), ("x", ""), ("5", "9" * 1000), (r"\pi", r"$\frac{2\pi}{2}$"),
    ):  # fmt: skip
        before, problem = len(asked), Problem("?", gold, "")
        completion = f"<answer>\n{answer}\n</answer>"
        ahead = task.judge_request(completion, problem)
        task.is_correct(completion, problem)
        assert asked[before:] == ([] if ahead is None else [ahead]), (gold, answer)
    assert len(asked) >= 2
    task.equal.cache_clear()
