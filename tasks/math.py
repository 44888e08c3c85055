r"""Mathematics whose answers are LaTeX, judged by math-verify.

    pip install math-verify==0.9.0
    python main.py --dataset_name math --dataset_path FILE.jsonl

FILE.jsonl has `question` or `problem`, `answer` (as \frac{3}{4} or (3, \pi)) and, for a cold start,
`solution` on every line, e.g. test.jsonl of https://huggingface.co/datasets/HuggingFaceH4/MATH-500.
That one is a test split; the lines of one file are split here, one in five held out.

math-verify runs in a process of its own (see judge.py): it may hang, and its own time limits are
signals that would end that of --reward_timeout. Of its ways to read an answer only LaTeX is used,
for the other is Python's eval; sympy evaluates numbers and names on the way, which are read here.
"""

import re
from functools import lru_cache
from importlib import util

from evaluator import answers_match, extract_answer, soft_format, strict_format, tag_count
from tasks.verifier_process import Judge, without_eval
from utils import UserError

if not util.find_spec("math_verify"):
    raise UserError("--dataset_name math: run pip install math-verify==0.9.0")

LONGEST = 500  # characters; an answer beyond is none
JUDGE = Judge("tasks.math")
EXAMPLE = (r"\frac{1}{2}", "0.5")
EVALUATED = re.compile(r"(Integer|Float|Symbol) \('?([\w.]+)'? \)|E ")  # as sympy writes it


def judge(gold, answer):
    """Whether an answer equals the gold one. Called in the judge's process."""
    from math_verify import LatexExtractionConfig, parse, verify

    with without_eval("sympy.parsing", number_or_name):
        gold, answer = (
            parse(text if r"\boxed" in text else rf"\boxed{{{text.strip('$')}}}",
                  [LatexExtractionConfig()], parsing_timeout=None)
            for text in (gold, answer)
        )  # fmt: skip
        return verify(gold, answer, timeout_seconds=None)


def number_or_name(code, *_):
    import sympy

    kind, text = EVALUATED.fullmatch(code).groups()
    return getattr(sympy, kind)(text) if kind else sympy.E


@lru_cache(maxsize=4096)  # accuracy and rewards ask about the same answers
def equal(gold, answer):
    return answers_match(answer, gold) or JUDGE(gold, answer) is True


def is_correct(completion, problem):
    """Whether the answer in the tags equals the gold answer, as numbers, as text or as LaTeX."""
    answer = extract_answer(completion)
    return bool(answer) and len(answer) <= LONGEST and equal(problem.answer, answer)


def correctness(completion, problem):
    """2.0 for the right answer, else 0."""
    return 2.0 if is_correct(completion, problem) else 0.0


REWARD_FUNCTIONS = [correctness, strict_format, soft_format, tag_count]
