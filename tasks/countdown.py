"""Countdown: reach a number by calculating with three or four others, each used exactly once.

As in TinyZero (https://github.com/Jiayi-Pan/TinyZero) and GRPO-Zero: whole numbers below 100 and
+ - * / and brackets. One of them:

    question  Use the numbers 19, 36, 55 and 7, each exactly once, with + - * / and brackets, to
              reach 65.
    answer    55 + 36 - 19 - 7

Any expression that reaches the target is right, in whatever signs and brackets it is written, and
with its result behind it if that is true.
"""

import random

from evaluator import extract_answer, soft_format, strict_format, tag_count, unwrapped
from rldatasets import Problem, is_held_out
from tasks.expressions import CALCULATE, LONGEST, parsed

SIZES = {"train": 4096, "test": 1024}
LARGEST = 99  # of the numbers; targets are from 10 to this


def answered(completion):
    """The Expression in the answer tags, without what is put around it. Results may follow, as in
    "3 * 5 = 15": one that is not its value makes it none."""
    text = extract_answer(completion)
    if text is None or len(text) > LONGEST:
        return None
    first, *results = map(parsed, unwrapped(text).replace("＝", "=").split("="))
    true = first and all(result and result.value == first.value for result in results)
    return first if true else None


def uses_the_numbers(expression, problem):
    return expression is not None and sorted(expression.numbers) == problem.extra["numbers"]


def is_correct(completion, problem):
    """Whether the answer in the tags uses each given number once and reaches the target."""
    expression = answered(completion)
    return uses_the_numbers(expression, problem) and expression.value == problem.extra["target"]


# --- rewards -------------------------------------------------------------------------------------


def correctness(completion, problem):
    """2.0 for an expression that reaches the target with each number once, else 0."""
    return 2.0 if is_correct(completion, problem) else 0.0


def each_number_once(completion, problem):
    """0.5 where the answer is an expression with each given number once and no other, else 0."""
    return 0.5 if uses_the_numbers(answered(completion), problem) else 0.0


REWARD_FUNCTIONS = [correctness, each_number_once, strict_format, soft_format, tag_count]

# --- problems ------------------------------------------------------------------------------------


def problems(split, seed):
    """Distinct problems that have a solution. Numbers and target occur in one split alone, and the
    test split is the same for every seed."""
    rng = random.Random("test" if split == "test" else seed)
    found = {}
    while len(found) < SIZES[split]:
        numbers = [rng.randint(1, LARGEST) for _ in range(rng.choice((3, 4)))]
        solved = _calculation(rng, numbers)
        if solved is None:
            continue
        target, answer, steps = solved
        key = f"{sorted(numbers)} {target}"
        if is_held_out(key) == (split == "test"):
            found.setdefault(key, _problem(numbers, target, answer, steps))
    return list(found.values())


def _problem(numbers, target, answer, steps):
    given = f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
    question = (f"Use the numbers {given}, each exactly once, with + - * / and brackets, to reach "
                f"{target}.")  # fmt: skip
    return Problem(question, answer, steps, {"numbers": sorted(numbers), "target": target})


def _calculation(rng, numbers):
    """Join random pairs until one is left: (target, expression, its steps); None where a step
    leaves the whole numbers from 1 on, or the target is out of range."""
    parts = [(number, str(number), 3) for number in numbers]  # value, text, how firmly it holds
    steps = []
    while len(parts) > 1:
        (a, left, held_left), (b, right, held_right) = (
            parts.pop(rng.randrange(len(parts))) for _ in range(2)
        )
        operation = rng.choice("+-*/")
        if (operation == "-" and a <= b) or (operation == "/" and a % b):
            return None
        value = a // b if operation == "/" else CALCULATE[operation](a, b)
        holds = 1 if operation in "+-" else 2
        left = f"({left})" if held_left < holds else left
        right = f"({right})" if held_right < holds + (operation in "-/") else right
        parts.append((value, f"{left} {operation} {right}", holds))
        steps.append(f"{a} {operation} {b} = {value}")
    [(target, text, _)] = parts
    return (target, text, "\n".join(steps)) if 10 <= target <= LARGEST else None
