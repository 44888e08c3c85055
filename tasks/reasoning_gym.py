"""The generated tasks of reasoning-gym (https://github.com/open-thought/reasoning-gym).

    pip install reasoning-gym==0.1.25
    python main.py --dataset_name reasoning_gym/chain_sum

The reward is the library's own score of an answer, from 0 to 1; 1 is solved, and what accuracy
counts. Several of its verifiers hand the answer to `eval`. Here they run in a process of their own,
in which `eval` reads a literal and nothing else (see judge.py); tasks that need more are refused.
Train and test come from different seeds, and the test's questions are left out of training. The
library has no worked solutions: a cold start teaches the format alone.
"""

import math
from functools import lru_cache
from importlib import util

from evaluator import extract_answer, soft_format, strict_format, tag_count
from rldatasets import Problem
from tasks.verifier_process import Judge, without_eval
from utils import UserError, mixed_seed

if not util.find_spec("reasoning_gym"):
    raise UserError("--dataset_name reasoning_gym: run pip install reasoning-gym==0.1.25")

from reasoning_gym.factory import DATASETS, create_dataset

SIZES = {"train": 2048, "test": 512}  # before questions that occur twice are left out
VARIANTS = sorted(DATASETS.keys() - {"composite"})
JUDGE = Judge("tasks.reasoning_gym")
EXAMPLE = ("chain_sum", 0, 0, "1")


def problems(split, seed, variant):
    """Distinct problems, for training none of the test's, which are the same for every seed."""
    source = mixed_seed("test" if split == "test" else seed) % 2**31
    left_out = set() if split == "test" else {p.question for p in problems("test", 0, variant)}
    found = {}
    try:
        for index in range(SIZES[split]):
            entry = dataset(variant, source)[index]
            question, answer = entry["question"], str(entry["answer"])
            place = {"variant": variant, "seed": source, "index": index}
            if question not in left_out:
                found[question] = Problem(question, answer, f"The answer is {answer}.", place)
    except Exception as error:
        reason = " ".join(str(error).split())[:60]
        raise UserError(f"--dataset_name reasoning_gym/{variant}: makes no problems with its "
                        f"defaults ({reason}); choose another") from None  # fmt: skip
    first = next(iter(found.values()), None)
    if first and value(first.answer, **first.extra) < 1:
        raise UserError(f"--dataset_name reasoning_gym/{variant}: its verifier refuses its own "
                        "answer, or needs eval; choose another")  # fmt: skip
    return list(found.values())


@lru_cache(maxsize=4)
def dataset(variant, seed):
    return create_dataset(variant, seed=seed, size=max(SIZES.values()))


def judge(variant, seed, index, answer):
    """The library's score of an answer. Called in the judge's process."""
    entry = dataset(variant, seed)[index]
    with without_eval("reasoning_gym"), without_eval("sympy.parsing"):
        return float(dataset(variant, seed).score_answer(answer, entry))


@lru_cache(maxsize=4096)  # accuracy and rewards ask about the same answers
def value(answer, variant, seed, index):
    verdict = JUDGE(variant, seed, index, answer)
    return verdict if verdict is not None and math.isfinite(verdict) else 0.0


def score(completion, problem):
    """reasoning-gym's score of the answer in the tags, 0 without one."""
    answer = extract_answer(completion)
    return 0.0 if answer is None else value(answer, **problem.extra)


def is_correct(completion, problem):
    """Whether that score is 1."""
    return score(completion, problem) >= 1


REWARD_FUNCTIONS = [score, strict_format, soft_format, tag_count]
