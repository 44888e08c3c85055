"""Countdown: its problems can be solved, and its verifier reads expressions as Python would."""

import ast
import builtins
import itertools
import operator
import random
import re
import time
from fractions import Fraction

import pytest

from rldatasets import Problem, worked_answer
from tasks import countdown
from tasks.countdown import REWARD_FUNCTIONS, is_correct
from tasks.expressions import DEEPEST, DIGITS, LONGEST, parsed

PROBLEM = Problem("?", "(3 + 4) * 5", "", {"numbers": [3, 4, 5], "target": 35})
OPERATIONS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip


def written(answer):
    return f"<reasoning>\n\n</reasoning>\n<answer>\n{answer}\n</answer>\n"


def reference(text):
    """(value, numbers) of an expression by Python's own parser, whose tree is walked by hand."""
    depths = itertools.accumulate((c == "(") - (c == ")") for c in text)
    if len(text) > LONGEST or max(depths, default=0) > DEEPEST:
        return None
    for sign, plain in {"×": "*", "−": "-", "x": "*"}.items():
        text = re.sub(sign, plain, text)
    if "**" in text or "//" in text:
        return None
    if re.search(rf"[^0-9+\-*/()\s]|[0-9]{{{DIGITS + 1}}}", text):
        return None
    text = re.sub(r"\s", " ", text).strip()
    text = re.sub(r"(?<![0-9])0+(?=[0-9])", "", text)  # Python has no 007
    numbers = []

    def walk(node):
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
            left, right = walk(node.left), walk(node.right)
            return OPERATIONS[type(node.op)](left, right)
        if isinstance(node, ast.Constant) and type(node.value) is int:
            numbers.append(node.value)
            return Fraction(node.value)
        raise SyntaxError

    try:
        return walk(ast.parse(text, mode="eval").body), tuple(numbers)
    except (SyntaxError, ZeroDivisionError):
        return None


def fuzzed(rng):
    """A random expression, right in form or, half of the time, spoilt in a few places."""

    def expression(depth):
        if depth == 0 or rng.random() < 0.3:
            number = str(rng.choice((0, 1, 7, rng.randint(0, 99), rng.randint(0, 10**7))))
            return "0" * (rng.random() < 0.05) + number
        inside = rng.choice("+-*/").join(expression(depth - 1) for _ in range(rng.randint(2, 3)))
        return f"({inside})" if rng.random() < 0.6 else inside

    text = "".join(c + " " * (rng.random() < 0.2) for c in expression(rng.randint(0, 4)))
    for _ in range(rng.randint(1, 3) if rng.random() < 0.5 else 0):
        at = rng.randint(0, len(text))
        text = (
            text[:at] + rng.choice("0123456789+-*/() \n._x=²٣−×^%") + text[at + rng.randint(0, 1) :]
        )
    return text


def test_twelve_thousand_expressions_are_read_as_python_reads_them():
    rng = random.Random(0)
    right = 0
    for _ in range(12_000):
        text = fuzzed(rng)
        found = parsed(text)
        assert (found and (found.value, found.numbers)) == reference(text), text
        right += found is not None
    assert 3000 < right < 10_000  # enough of both kinds


def test_no_text_is_ever_evaluated_by_python(monkeypatch):
    texts = [fuzzed(random.Random(i)) for i in range(500)]
    texts += ["__import__('os').abort()", "print(1)", "[].append(1)", "lambda: 1", "1 if 1 else 2"]

    def reached(*_, **__):
        raise AssertionError("a text was handed to Python")

    with monkeypatch.context() as patch:
        patch.setattr(ast, "parse", reached)
        patch.setattr(ast, "literal_eval", reached)
        for name in (
            "open",
            "exec",
            "compile",
            "eval",
            "__import__",
        ):  # the last, for setattr's own
            patch.setattr(builtins, name, reached)
        scores = [
            function(written(text), PROBLEM) for text in texts for function in REWARD_FUNCTIONS
        ]
    assert len(scores) == 505 * len(REWARD_FUNCTIONS)


def test_any_text_is_scored_without_an_error():
    rng = random.Random(1)
    alphabet = "()+-*/0123456789 \n<>answer\u0000\u2028\ud800²½٣😀"
    for _ in range(2000):
        text = "".join(rng.choices(alphabet, k=rng.randint(0, 60)))
        for completion in (text, written(text)):
            assert all(function(completion, PROBLEM) >= 0 for function in REWARD_FUNCTIONS)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("(3 + 4) * 5", True), ("5*(4+3)", True), ("((5))*(3+(4))", True), ("5 * 4 + 5 * 3", False),
        ("35", False), ("3 * 4 + 5", False), ("7 * 5", False), ("(3 + 4) * 5 = 35", True),
        ("(3 + 4) * 5 + 0", False), ("-(3 + 4) * -5", False), ("(3 + 4) 5", False), ("", False),
        ("(3 + 4) * 5.", True), ("(3 + 4) * 5\n(3 + 4) * 5", False), ("34 + 1", False),
    ],
)  # fmt: skip
def test_an_answer_is_right_where_it_reaches_the_target_with_each_number_once(answer, right):
    assert is_correct(written(answer), PROBLEM) is right
    assert is_correct(answer, PROBLEM) is False  # without its tags


def test_fractions_on_the_way_are_exact():
    problem = Problem("?", "", "", {"numbers": [3, 3, 8, 8], "target": 24})
    assert is_correct(written("8 / (3 - 8 / 3)"), problem)
    problem = Problem("?", "", "", {"numbers": [1, 3, 3], "target": 1})
    assert is_correct(written("1 / 3 * 3"), problem)
    assert not is_correct(written("1 / (3 - 3)"), problem)


def test_a_number_that_is_given_twice_is_used_twice():
    problem = Problem("?", "", "", {"numbers": [5, 5, 6], "target": 31})
    assert is_correct(written("5 * 5 + 6"), problem)
    assert not is_correct(written("5 * 6 + 1"), problem) and not is_correct(written("31"), problem)


@pytest.mark.parametrize(
    "text",
    ["(" * 10**6, "1" * 10**6, "1+" * 10**6, "(1)" * 10**6, "9*" * 99 + "9", "((" * 40 + "1",
     "<answer>" * 10**5],
    ids=lambda text: f"{len(text)} of {text[:3]}",
)  # fmt: skip
def test_a_megabyte_of_brackets_or_digits_takes_no_time(text):
    for completion in (text, written(text)):
        for function in REWARD_FUNCTIONS:
            started = time.thread_time()
            function(completion, PROBLEM)
            assert time.thread_time() - started < 0.05


def test_length_depth_and_digits_are_bounded():
    assert parsed("1" + "+1" * (LONGEST // 2 - 1)).value == LONGEST // 2
    assert parsed("1" + "+1" * (LONGEST // 2)) is None
    assert parsed("(" * DEEPEST + "1" + ")" * DEEPEST).value == 1
    assert parsed("(" * (DEEPEST + 1) + "1" + ")" * (DEEPEST + 1)) is None
    assert parsed("9" * DIGITS).value == 10**DIGITS - 1 and parsed("9" * (DIGITS + 1)) is None


# --- problems ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(countdown, "SIZES", {"train": 400, "test": 100})
        return {(split, seed): countdown.problems(split, seed)
                for split in ("train", "test") for seed in (1, 2)}  # fmt: skip


def keys(problems):
    return {(*problem.extra["numbers"], problem.extra["target"]) for problem in problems}


def test_every_problem_states_what_its_solution_solves(made):
    for problem in made["train", 1] + made["test", 1]:
        *numbers, target = map(int, re.findall(r"\d+", problem.question))
        assert len(numbers) in (3, 4) and 10 <= target <= 99 and set(numbers) <= set(range(1, 100))
        assert problem.extra == {"numbers": sorted(numbers), "target": target}
        value, used = reference(problem.answer)
        assert (value, sorted(used)) == (target, sorted(numbers))
        steps = problem.solution.split("\n")
        assert len(steps) == len(numbers) - 1 and steps[-1].endswith(f" = {target}")
        for step in steps:
            calculation, result = step.split(" = ")
            assert reference(calculation)[0] == int(result)


def test_a_worked_answer_earns_every_reward(made):
    problem = made["train", 1][0]
    scores = {f.__name__: f(worked_answer(problem), problem) for f in REWARD_FUNCTIONS}
    assert scores == {"correctness": 2.0, "each_number_once": 0.5, "strict_format": 0.5,
                      "soft_format": 0.5, "tag_count": 0.5}  # fmt: skip


def test_train_and_test_share_no_numbers_with_their_target(made):
    assert [len(made[key]) for key in made] == [400, 400, 100, 100]
    assert all(len(keys(problems)) == len(problems) for problems in made.values())
    assert not keys(made["train", 1] + made["train", 2]) & keys(made["test", 1])
    assert made["test", 1] == made["test", 2]
    assert made["train", 1] != made["train", 2]


def test_the_numbers_alone_earn_less_than_the_target():
    scores = [countdown.each_number_once(written(text), PROBLEM) for text in ("3 + 4 + 5", "35")]
    assert scores == [0.5, 0.0] and countdown.correctness(written("3 + 4 + 5"), PROBLEM) == 0.0
