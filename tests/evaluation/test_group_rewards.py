"""Rewards that see a group: called once a question, in the one list, guarded and linted."""

import math
import textwrap
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TASK
from toys import written

import evaluator
from evaluation.held_out import evaluate
from evaluation.reward_lint import lint
from evaluation.scoring import score
from evaluation.verdicts import verifier_facts
from evaluator import REWARD_FUNCTIONS, correctness, of_group, shortest_right
from launch.commands import main
from rldatasets import Problem
from tasks import own_evaluator
from utils import UserError

GOLD, FIVE = Problem("How many?", "72", ""), Problem("And now?", "5", "")


def rollouts_of(*texts):
    return SimpleNamespace(texts=list(texts))


@of_group
def rank(completions, problem):
    """The place of each completion by its length, from the shortest, plus the gold answer."""
    ordered = sorted(completions, key=len)
    return [ordered.index(text) + int(problem.answer) for text in completions]


def test_a_group_is_scored_at_once_and_stands_beside_the_others_under_its_name():
    rollouts = rollouts_of(["aaa", "a", written()], [written("5"), "", "b"])
    rewards = score(rollouts, [GOLD, FIVE], [correctness, rank], {"rank": 0.5})
    assert rewards.names == ["correctness", "rank"]
    assert rewards.per_function[..., 0].tolist() == [[0.0, 0.0, 2.0], [2.0, 0.0, 0.0]]
    assert rewards.per_function[..., 1].tolist() == [[73.0, 72.0, 74.0], [7.0, 5.0, 6.0]]
    assert rewards.total.tolist() == [[36.5, 36.0, 39.0], [5.5, 2.5, 3.0]]


def test_the_example_pays_the_shorter_of_right_answers_and_nothing_else():
    long, middle, short, wrong = "so " * 10 + written(), "so " * 5 + written(), written(), "7"
    assert shortest_right([long, wrong, short, middle, short], GOLD) == [0, 0, 0.5, 0.25, 0.5]
    assert shortest_right([wrong, "", short], GOLD) == [0, 0, 0]
    assert shortest_right([wrong, ""], GOLD) == [0, 0]


def returns(value):
    @of_group
    def picky(completions, problem):
        if isinstance(value, str) and value == "raises":
            return {}["no such key"]
        while isinstance(value, str) and value == "hangs":
            pass
        return value

    return picky


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("raises", "raised KeyError"), ("hangs", "took more than --reward_timeout 0.2 seconds"),
        (1.0, "returned 1.0, not 2 numbers"), ([1.0], "not 2 numbers"), (None, "returned None"),
        ([1.0, None], "returned None, not a finite number"), ([math.nan, 1.0], "returned nan"),
        ([1.0, 1e200], "above 1e+100 in size"), ("ab", "returned 'ab', not 2 numbers"),
    ],
)  # fmt: skip
def test_a_broken_one_is_named_with_question_completion_and_file(value, said):
    with pytest.raises(UserError) as raised:
        score(rollouts_of(["one", "two"]), [GOLD], [returns(value)], file="FILE", timeout=0.2)
    for part in ("reward function picky", said, "How many?", "see FILE"):
        assert part in str(raised.value)
    if "1e200" in repr(value) or value == [1.0, None]:
        assert "completion 'two'" in str(raised.value)


def test_numbers_of_numpy_and_torch_are_numbers():
    np, torch = pytest.importorskip("numpy"), pytest.importorskip("torch")
    for value in (np.array([0.5, 1]), torch.tensor([0.5, 1.0]), (0.5, True), [np.float32(0.5), 1]):
        assert score(rollouts_of(["a", "b"]), [GOLD], [returns(value)]).total.tolist() == [[0.5, 1]]


# --- the file that a person edits --------------------------------------------------------------


def file_with(tmp_path, *lines, name="rewards"):
    path = tmp_path / f"{name}.py"
    head = "from evaluator import of_group\n"
    path.write_text(head + textwrap.dedent("\n".join(lines)) + "\nREWARD_FUNCTIONS = [mine]\n")
    return str(path)


def test_a_file_of_one_s_own_may_have_one(tmp_path):
    path = file_with(
        tmp_path, "@of_group", "def mine(completions, problem):",
        "    return [completions.count(text) for text in completions]",
    )  # fmt: skip
    [mine] = own_evaluator(path)["REWARD_FUNCTIONS"]
    assert score(rollouts_of(["a", "b", "a"]), [GOLD], [mine]).total.tolist() == [[2, 1, 2]]


def test_one_that_takes_other_things_is_refused_with_its_line(tmp_path):
    path = file_with(tmp_path, "@of_group", "def mine(completions):", "    return []", name="bad")
    with pytest.raises(UserError, match=r"does not take \(completions, problem\)"):
        own_evaluator(path)


# --- where one completion is judged ------------------------------------------------------------


def test_a_greedy_answer_and_the_task_s_own_problems_are_judged_without_it(monkeypatch):
    task = replace(TASK, reward_functions=[correctness, returns([1.0])])
    facts = verifier_facts(task, [GOLD, FIVE])
    assert max(facts.earned.values()) == 2.0
    answers = SimpleNamespace(
        texts=[[written()]], finished=SimpleNamespace(tolist=lambda: [[True]]),
        completion_mask=pytest.importorskip("torch").ones(1, 1, 4),
    )  # fmt: skip
    monkeypatch.setattr("evaluation.held_out.sample_rollouts", lambda *args, **more: answers)
    monkeypatch.setattr("evaluation.held_out.prompt_of", lambda *args: [1])
    monkeypatch.setattr("evaluation.held_out.without_thoughts", lambda rollouts, setup: rollouts)
    args = SimpleNamespace(
        reward_timeout=1.0,
        max_completion_length=4,
        stop=[],
        eval_batch_size=4,
        eval_samples=0,
        rebuttals=0,
    )
    for functions in ([correctness, rank], [rank]):
        setup = SimpleNamespace(
            args=args, task=replace(task, reward_functions=functions), policy=None,
            tokenizer=SimpleNamespace(decode=str),
        )  # fmt: skip
        [record] = evaluate(setup, [GOLD])
        expected = {"correctness": 2.0} if len(functions) == 2 else {}
        assert record["rewards"] == expected


# --- the lint ----------------------------------------------------------------------------------


def found(function):
    return "\n".join(lint([*REWARD_FUNCTIONS, function]).findings)


def planted(kind):
    @of_group
    def mine(completions, problem):
        paid = shortest_right(completions, problem)
        if kind == "order":
            return [value + 0.01 * place for place, value in enumerate(paid)]
        if kind == "copies":  # the first of them alone
            return [float(text not in completions[:g]) for g, text in enumerate(completions)]
        if kind == "wrong":
            return [0.5 - value for value in paid]
        return {"raises": None, "one": 1.0, "nan": [math.nan] * len(completions)}[kind]

    return mine


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("order", "mine depends on the order of the completions"),
        ("copies", "mine depends on the order of the completions"),
        ("wrong", "mine pays a wrong answer more than the right one, perfect format: 0"),
        ("raises", "mine returns None, not"), ("one", "mine returns 1.0, not"),
        ("nan", "mine returns [nan, nan"),
    ],
)  # fmt: skip
def test_the_lint_finds_what_is_planted(kind, said):
    assert said in found(planted(kind))


def test_the_lint_passes_the_example_alone_and_beside_others():
    assert found(shortest_right) == ""
    assert lint([shortest_right]).findings == []


def test_the_lint_takes_what_a_run_takes():
    @of_group
    def of_numpy(completions, problem):
        return np.array(shortest_right(completions, problem))

    @of_group
    def of_the_step(completions, problem, step):
        return shortest_right(step[problem.question], problem)

    assert found(of_numpy) == found(of_the_step) == ""


def test_the_lint_command_takes_the_file(tmp_path, capsys):
    lines = (
        "@of_group",
        "def mine(completions, problem):",
        "    return [*range(len(completions))]",
    )
    assert main(["lint", "--evaluator", file_with(tmp_path, *lines, name="other")]) == 1
    assert "mine depends on the order" in capsys.readouterr().out
    assert evaluator.sees_group(shortest_right) and not evaluator.sees_group(correctness)
