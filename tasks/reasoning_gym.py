"""The generated tasks of reasoning-gym (https://github.com/open-thought/reasoning-gym).

    pip install reasoning-gym==0.1.25
    python main.py --dataset_name reasoning_gym/chain_sum

The reward is the library's own score of an answer, from 0 to 1; exactly 1 is solved, and what
accuracy counts. Several of its verifiers hand the answer to `eval`. Here they run in a process of
their own, in which `eval` reads a literal and nothing else (see verifier_process.py); tasks that
need more are refused, and so are those whose problems have no answer. Some generators depend on the
order of sets, or on Python's global random numbers: problems are made in a process with both fixed,
so that they are a function of (variant, seed). Train and test come from different seeds, and the
test's questions are left out of training. The library has no worked solutions: a cold start teaches
the format alone.
"""

import ast
import json
import math
import os
import random
import subprocess
import sys
from functools import lru_cache
from importlib import util
from pathlib import Path

import numpy as np

from evaluator import extract_answer, soft_format, strict_format, tag_count
from rldatasets import Problem, normal
from tasks.verifier_process import Judge, without_eval
from utils import UserError, mixed_seed

if not util.find_spec("reasoning_gym"):
    raise UserError("--dataset_name reasoning_gym: run pip install reasoning-gym==0.1.25")


def library():
    from reasoning_gym import factory

    return factory


SIZES = {"train": 2048, "test": 512}  # before questions that occur twice are left out
CHECKED = 20  # problems whose own answers have to be right
VARIANTS = sorted(library().DATASETS.keys() - {"composite"})
JUDGE = Judge("tasks.reasoning_gym")
EXAMPLE = ("chain_sum", 0, "{'question': '1 + 1 = ?', 'answer': '2', 'metadata': {}}", "2")


def problems(split, seed, variant):
    """Distinct problems, for training none of the test's, which are the same for every seed."""
    flag = f"--dataset_name reasoning_gym/{variant}"
    source = mixed_seed("test" if split == "test" else seed) % 2**31
    held_out = () if split == "test" else problems("test", 0, variant)
    known, found = {normal(problem.question) for problem in held_out}, []
    for question, answer, entry in made(variant, source, SIZES[split]):
        if answer is None:
            raise UserError(f"{flag}: its problems come without an answer; choose another")
        if normal(question) not in known:
            known.add(normal(question))
            place = {"variant": variant, "seed": source, "entry": entry}
            found.append(Problem(question, answer, f"The answer is {answer}.", place))
    checked = found[:CHECKED]
    if 2 * sum(verdict(p.answer, **p.extra) == 1 for p in checked) < len(checked):
        raise UserError(f"{flag}: its verifier refuses its own answer, or needs eval; choose "
                        "another")  # fmt: skip
    return found


# --- problems, made in a process of their own ----------------------------------------------------


@lru_cache(maxsize=4)  # the test's are asked for twice
def made(variant, seed, size):
    """(question, answer or None, entry) of the library's first items, less those that it fails to
    make. An entry is a literal, as text. Raises UserError where it makes none."""
    process = subprocess.run(
        [sys.executable, "-m", "tasks.reasoning_gym", variant, str(seed), str(size)],
        cwd=Path(__file__).parent.parent, env={**os.environ, "PYTHONHASHSEED": "0"},
        capture_output=True, text=True,
    )  # fmt: skip
    rows = [json.loads(line) for line in process.stdout.splitlines()]
    if not rows:
        reason = " ".join(process.stderr.strip().rpartition("\n")[2].split())[:60]
        raise UserError(f"--dataset_name reasoning_gym/{variant}: makes no problems with its "
                        f"defaults ({reason}); choose another")  # fmt: skip
    return rows


def make(variant, seed, size):
    """Print what `made` returns, a line of JSON each; what the library prints goes elsewhere."""
    channel, sys.stdout = sys.stdout, sys.stderr
    items, failure = dataset(variant, seed), ""
    for index in range(size):
        random.seed(f"{seed} {index}")
        np.random.seed([seed, index])
        try:
            entry = items[index]
        except Exception as error:
            failure = error
            continue
        answer = None if entry["answer"] is None else str(entry["answer"])
        row = [entry["question"], answer, repr(plain(entry))]
        print(json.dumps(row), file=channel, flush=True)
    print(failure, file=sys.stderr)


def plain(value):
    """The same nested value of Python's own types, so that its repr is a literal. What has no
    literal, such as a Fraction, becomes text."""
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        kind = next(kind for kind in (list, tuple, set, frozenset) if isinstance(value, kind))
        return (set if kind is frozenset else kind)(map(plain, value))
    if isinstance(value, np.generic):
        value = value.item()
    return value if isinstance(value, bool | int | float | str | None) else str(value)


# --- verdicts ------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def dataset(variant, seed):
    return library().create_dataset(variant, seed=seed, size=max(SIZES.values()))


def judge(variant, seed, entry, answer):
    """The library's score of an answer to an entry. Called in the judge's process."""
    entry = ast.literal_eval(entry)
    with without_eval("reasoning_gym"), without_eval("sympy.parsing"):
        return float(dataset(variant, seed).score_answer(answer, entry))


def verdict(answer, variant, seed, entry):
    """The library's score, 0 where it is none."""
    score = JUDGE(variant, seed, entry, answer)
    return score if score is not None and math.isfinite(score) else 0.0


def judge_request(completion, problem):
    """What the judge is asked about a completion; None where it is not."""
    answer = extract_answer(completion)
    extra = problem.extra
    return None if answer is None else (extra["variant"], extra["seed"], extra["entry"], answer)


def score(completion, problem):
    """reasoning-gym's score of the answer in the tags, 0 without one. At most 1, beyond which a
    sum of parts may be rounded."""
    answer = extract_answer(completion)
    return 0.0 if answer is None else min(verdict(answer, **problem.extra), 1.0)


def is_correct(completion, problem):
    """Whether that score is 1 before it is cut: beyond, parts were added up, and not all were
    right (spell_backward: 1.0000000000000002 for an answer with letters too many)."""
    answer = extract_answer(completion)
    return answer is not None and verdict(answer, **problem.extra) == 1


REWARD_FUNCTIONS = [score, strict_format, soft_format, tag_count]

if __name__ == "__main__":
    make(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
