"""What a task's verdict makes of the task's own problems, before a model finds it out.

The answers that nobody has to think for are judged on a sample of problems: each problem's own gold
answer, none, a constant one, and that of another problem. Every run, and `python main.py lint` with
a dataset, tells what is right for nothing, or not for the gold answer.
"""

import re
import time
from collections import Counter
from dataclasses import dataclass, replace

import evaluator
from utils import TimedOut, UserError, as_number, time_limit

SAMPLE = 20  # problems
SECONDS = 20.0  # for all of it; no further problem is judged after them
OWN, EMPTY, OTHER = "its own gold answer", "an empty answer", "another problem's answer"
# Where the task's worked_answer is not in a form that its verdict reads: other forms that people
# ask for.
FORMS = {
    r"\boxed{ }": "{reasoning}\nThe answer is \\boxed{{{answer}}}.\n",
    "####": "{reasoning}\n#### {answer}\n",
    "Answer:": "{reasoning}\nAnswer: {answer}\n",
    "<think>, then <answer>":
        "<think>\n{reasoning}\n</think>\n<answer>\n{answer}\n</answer>\n",
    r"<think>, then \boxed{ }": "<think>\n{reasoning}\n</think>\n\n\\boxed{{{answer}}}\n",
    "<think>, then the answer": "<think>\n{reasoning}\n</think>\n\n{answer}\n",
    "the answer alone": "{answer}",
}  # fmt: skip
NUMBER_FIRST = re.compile(r"[-\u2212+]?[$€£¥₹]?[-\u2212]?\.?[0-9]")


@dataclass(frozen=True)
class Facts:
    """How often each kind of answer is right, and the mean of what it earns, over `problems`
    problems: {kind: share} and {kind: reward}, the kinds being OWN, EMPTY, OTHER (where no two
    golds are the same) and the constants, as they are written. `form`: how answers were written."""

    problems: int
    form: str
    right: dict
    earned: dict


def verifier_facts(task, problems, timeout=10.0, weights=None):
    """The Facts of a task on a sample of its problems; None where its verdict reads a right answer
    in none of the forms that are known.

    A verdict or reward that raises, or takes more than `timeout` seconds, counts as 0.
    """
    problems = list(problems)
    sample = problems[:: max(1, len(problems) // SAMPLE)][:SAMPLE]
    until = time.monotonic() + SECONDS
    found = _form(task, sample, timeout, until)
    if found is None:
        return None
    form, write = found
    common = Counter(problem.answer for problem in problems).most_common(1)[0][0]
    constants = dict.fromkeys([common, "0"])
    golds = [problem.answer for problem in sample]
    right, earned = Counter(), Counter()
    judged = others = 0
    for at, problem in enumerate(sample):
        if judged and time.monotonic() > until:
            break
        judged += 1
        completions = {OWN: _written(write, problem, problem.answer)}
        completions |= {text: _written(write, problem, text) for text in constants}
        other = next(
            (gold for gold in golds[at + 1 :] + golds[:at] if gold != problem.answer), None
        )
        if other is not None:
            others += 1
            completions[OTHER] = _written(write, problem, other)
        for kind, text in completions.items():
            right[kind] += _is_right(task, text, problem, timeout)
            earned[kind] += _earned(task, text, problem, timeout, weights or {})
        empty = ["", _written(write, problem, "")]  # nothing at all, and nothing in the right form
        right[EMPTY] += any(_is_right(task, text, problem, timeout) for text in empty)
        earned[EMPTY] += max(_earned(task, text, problem, timeout, weights or {}) for text in empty)
    counts = dict.fromkeys([OWN, EMPTY, *constants], judged) | ({OTHER: others} if others else {})
    return Facts(
        problems=judged,
        form=form,
        right={kind: right[kind] / count for kind, count in counts.items()},
        earned={kind: earned[kind] / count for kind, count in counts.items()},
    )


def complaint(facts):
    """What is wrong with these Facts in one line, with their numbers; None where nothing is."""
    constants = _constants(facts)
    for_nothing = (
        facts.right[EMPTY] > 0
        or any(facts.right[text] >= 0.5 for text in constants)
        or facts.right.get(OTHER, 0) > 0.1
    )
    if facts.right[OWN] < 1 or for_nothing:
        return shares(facts)
    best = max((EMPTY, *constants), key=facts.earned.get)
    if facts.earned[OWN] > 0 and facts.earned[best] > 0.9 * facts.earned[OWN]:
        return (f"{_quoted(best)} earns {facts.earned[best]:.2f} on average over {facts.problems} "
                f"problems, their own gold answers {facts.earned[OWN]:.2f}")  # fmt: skip
    return None


def shares(facts):
    """How often each kind of answer is right, in one line."""
    kinds = [OWN, EMPTY, *_constants(facts), *([OTHER] if OTHER in facts.right else [])]
    counts = ", ".join(f"{_quoted(kind)} {100 * facts.right[kind]:.0f} %" for kind in kinds)
    return f"is_correct calls right, of {facts.problems} problems: {counts}"


def _constants(facts):
    return [kind for kind in facts.right if kind not in (OWN, EMPTY, OTHER)]


def unmatched_golds(problems):
    """(how many gold answers begin with a number and are more than that, one of them or None). To
    evaluator.is_correct, only the same number and unit, or the same text, is their equal."""
    found = [p.answer for p in problems if NUMBER_FIRST.match(p.answer) and not _is_bare(p.answer)]
    return len(found), min(found, key=len, default=None)


def dataset_complaints(task, problems, weights, timeout):
    """A line for each thing that is wrong with a task's verdict on its own problems, and the Facts
    behind them or None."""
    lines = []
    if task.is_correct is evaluator.is_correct:
        count, example = unmatched_golds(problems)
        if count:
            lines.append(f"{count} of {len(problems)} gold answers are more than a number, e.g. "
                         f"`{example:.40}`: an answer needs the same behind it")  # fmt: skip
    facts = verifier_facts(task, problems, timeout, weights)
    if facts is None:
        lines.append(f"cannot be judged: in {SECONDS:g} s is_correct accepts no gold answer as "
                     "worked_answer writes it, or another way; define worked_answer")  # fmt: skip
    elif line := complaint(facts):
        lines.append(line)
    return lines, facts


def _is_bare(gold):
    gold, noted = evaluator.without_brackets(gold)
    value, unit = evaluator.measured(gold)
    return value is not None and (noted or not unit)


def _form(task, sample, timeout, until):
    """(name, function of a Problem) of the first form, the task's own before others, in which a
    gold answer is right; None where there is none, or not found in time."""

    def filled(form):
        return lambda problem: form.format(reasoning=problem.solution, answer=problem.answer)

    forms = {"worked_answer": task.worked_answer} | {name: filled(FORMS[name]) for name in FORMS}
    for name, write in forms.items():
        for problem in sample:
            text = _written(write, problem, problem.answer)
            if text and _is_right(task, text, problem, timeout):
                return name, write
            if time.monotonic() > until:
                return None
    return None


def _written(write, problem, answer):
    """The completion that gives this answer to a problem; "" where it cannot be written, or would
    give the gold answer away."""
    try:
        own = write(problem)
        if answer == problem.answer:
            return own
        text = write(replace(problem, answer=answer, solution="..."))
    except UserError:  # from a worked_answer of the user's
        return ""
    return "" if text == own else text


def _is_right(task, completion, problem, timeout):
    return bool(_value(task.is_correct, completion, problem, timeout))


def _earned(task, completion, problem, timeout, weights):
    return sum(
        weights.get(function.__name__, 1.0) * _value(function, completion, problem, timeout)
        for function in task.reward_functions
        if not evaluator.sees_group(function)
    )


def _value(function, completion, problem, timeout):
    try:
        with time_limit(timeout):
            value = function(completion, problem)
    except (Exception, TimedOut):
        return 0.0
    return as_number(value) or 0.0


def _quoted(kind):
    return kind if kind in (OWN, EMPTY, OTHER) else f"`{kind:.20}`"
