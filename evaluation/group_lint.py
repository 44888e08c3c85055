"""What rewards of_group reward: the golden completions of the lint, scored as one group.

Whatever such a reward compares, the same completions in another order, copies among them, earn the
same, and a wrong answer earns no more than the right one written alike. (What a referee is asked
about, referee_lint.py tries on the task's own golden pairs.)
"""

from evaluation.referee import bound
from evaluator import sees_group
from tasks import wants_referee
from utils import TimedOut, as_number, time_limit

TOLERANCE = 1e-9


def group_findings(functions, golden, problem, timeout):
    """A line for everything that is wrong with those of the rewards that see a group. golden:
    {name: completion}, of which "right, FORM" and "wrong, FORM" differ in the answer alone."""
    of_group = [f for f in functions if sees_group(f) and not wants_referee(f)]
    return [line for function in of_group for line in _findings(function, golden, problem, timeout)]


def _findings(function, golden, problem, timeout):
    texts = [*golden.values(), next(iter(golden.values()))]  # the last is a copy of the first
    try:
        earned = _earned(function, texts, problem, timeout)
        backwards = _earned(function, texts[::-1], problem, timeout)[::-1]
        of_each = _earned(function, texts[:-1], problem, timeout)
    except (ValueError, TimedOut) as error:
        yield f"{function.__name__} {error or f'takes more than {timeout:g} seconds'} for a group"
        return
    if any(abs(a - b) > TOLERANCE for a, b in zip(earned, backwards)):
        yield f"{function.__name__} depends on the order of the completions"
    by_name = dict(zip(golden, of_each))
    for name, right in by_name.items():
        wrong = by_name.get(name.replace("right, ", "wrong, ", 1), right)
        if wrong > right + TOLERANCE:
            yield (f"{function.__name__} pays a wrong answer more than the right one, "
                   f"{name.removeprefix('right, ')}: {wrong:g} to {right:g}")  # fmt: skip


def _earned(function, texts, problem, timeout):
    """A list of a float for each of the texts. Raises ValueError that says what came instead."""
    function = bound(function, step={problem.question: tuple(texts)})
    try:
        with time_limit(timeout):
            value = function(list(texts), problem)
        value = value.tolist() if hasattr(value, "tolist") else value  # of numpy or torch
    except Exception as error:
        text = " ".join(str(error).split())[:60]
        raise ValueError(f"raises {type(error).__name__}: {text}") from None
    numbers = [as_number(x) for x in value] if isinstance(value, list | tuple) else []
    if len(numbers) != len(texts) or None in numbers:
        raise ValueError(f"returns {value!r:.40}, not {len(texts)} finite numbers,")
    return numbers
