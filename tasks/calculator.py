"""Word problems with numbers too large for a small model's head, and a calculator to ask.

    question    A cinema has 87 rows of 46 seats. 1288 seats are taken. How many are free?
    the policy  <calculator>87 * 46 - 1288</calculator>
    the world   2714
    the policy  <answer>2714</answer>

A turn with a calculator's tags is a call, whatever else is in it, and one without ends the episode.
What it calculates is read by expressions.py, never carried out.
"""

import random
import re

from evaluator import is_correct
from rldatasets import Problem, is_held_out
from tasks.expressions import parsed

SYSTEM_PROMPT = """You have a calculator. To use it, write a calculation with + - * / and brackets:
<calculator>12 * (3 + 4)</calculator>
You are then told its result. When you know the answer, write it as a number:
<answer>84</answer>
"""
CALLS = 3  # of an episode; a further one ends it
UNREADABLE = "That is no calculation. Use whole numbers, + - * / and brackets."
CALL = re.compile("<calculator>(.*?)</calculator>", re.DOTALL)
ANSWER = re.compile(r"\s*<answer>[^<>]+</answer>\s*")
SIZES = {"train": 2048, "test": 1024}

# (question, its calculation)
STORIES = (
    ("A cinema has {a} rows of {b} seats. {c} seats are taken. How many are free?", "a * b - c"),
    ("A library has {c} books. It buys {a} boxes of {b} books each. How many books has it now?",
     "c + a * b"),
    ("{a} buses with {b} people each and {c} people on foot come to a match. How many come?",
     "a * b + c"),
    ("A shop sells {a} cups for {b} cents each and {d} plates for {e} cents each. How many cents "
     "does it earn?", "a * b + d * e"),
    ("A farm picks {a} sacks of {b} apples and {d} sacks of {e} pears. How many more apples than "
     "pears does it pick?", "a * b - d * e"),
    ("A baker makes {b} rolls a day. After {a} days, {c} of them were thrown away and the others "
     "sold for {e} cents each. How many cents did he earn?", "(a * b - c) * e"),
    ("{e} friends share the cost of {a} tents for {b} dollars each. How many dollars does each of "
     "them pay?", "a * b / e"),
    ("A tank of {c} litres is filled, and {a} canisters of {b} litres too. All of it is shared out "
     "over {e} fields. How many litres does each field get?", "(c + a * b) / e"),
)  # fmt: skip


def reply(problem, turns):
    """The result of the first call in the policy's turn; None where it calls no more."""
    call = CALL.search(turns[-1])
    if call is None or len(turns[::2]) > CALLS:
        return None
    expression = parsed(call[1])
    return UNREADABLE if expression is None else written(expression.value)


def written(value):
    """A fraction as a number with at most four decimal places."""
    if value.denominator == 1:
        return str(value.numerator)
    return f"{float(value):.4f}".rstrip("0").rstrip(".")


def worked_answer(problem):
    return [f"<calculator>{problem.solution}</calculator>", f"<answer>{problem.answer}</answer>"]


# --- rewards, of the last turn -------------------------------------------------------------------


def correctness(completion, problem):
    """2.0 for the right answer, else 0."""
    return 2.0 if is_correct(completion, problem) else 0.0


def answer_alone(completion, problem):
    """0.5 where the last turn is an answer in its tags and nothing else, else 0."""
    return 0.5 if ANSWER.fullmatch(completion) else 0.0


REWARD_FUNCTIONS = [correctness, answer_alone]

# --- problems ------------------------------------------------------------------------------------


def problems(split, seed):
    """Distinct problems with whole answers above 0. A calculation is in one split alone, and the
    test split is the same for every seed."""
    rng = random.Random("test" if split == "test" else seed)
    found = {}
    while len(found) < SIZES[split]:
        problem = _problem(rng, *rng.choice(STORIES))
        if is_held_out(problem.solution) == (split == "test"):
            found.setdefault(problem.solution, problem)
    return list(found.values())


def _problem(rng, question, calculation):
    while True:
        numbers = {name: rng.randint(12, 99) for name in "abde"} | {"c": rng.randint(100, 2000)}
        solution = "".join(str(numbers.get(sign, sign)) for sign in calculation)
        value = parsed(solution).value
        if value > 0 and value.denominator == 1:
            return Problem(question.format(**numbers), written(value), solution)
