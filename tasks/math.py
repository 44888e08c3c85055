r"""Mathematics whose answers are LaTeX, judged by math-verify.

    pip install math-verify==0.9.0
    python main.py --dataset_name math --dataset_path FILE.jsonl

FILE.jsonl has `question` or `problem`, `answer` (as \frac{3}{4} or (3, \pi)) and, for a cold start,
`solution` on every line, e.g. test.jsonl of https://huggingface.co/datasets/HuggingFaceH4/MATH-500.
That one is a test split; the lines of one file are split here, one in five held out.

math-verify runs in a process of its own (see verifier_process.py): it may hang, and its own time
limits are signals that would end that of --reward_timeout. Of its ways to read an answer only LaTeX
is used, for the other is Python's eval; sympy evaluates numbers and names on the way, which are
read here. It passes over much that makes two answers different (5 km and 5 mm, 3:2 and 3:1, 50 %
and 50, (1,2) and {1,2}, x and X, 12 to base 3 and 4): that is compared here, before it is asked.
"""

import logging
import re
from collections import Counter
from functools import lru_cache
from importlib import util

from evaluator import (
    ONE_UNIT,
    extract_answer,
    measured,
    soft_format,
    strict_format,
    tag_count,
    unwrapped,
)
from tasks.verifier_process import Judge, without_eval
from utils import UserError

if not util.find_spec("math_verify"):
    raise UserError("--dataset_name math: run pip install math-verify==0.9.0")

LONGEST = 500  # characters; an answer beyond is none
JUDGE = Judge("tasks.math")
EXAMPLE = (r"\frac{1}{2}", "0.5")
# What math-verify passes over: words, units, currency, degrees, percent, a number's base, primes.
WORDS = re.compile(r"\\(?:text(?:rm|bf|it)?|mathrm|mbox)\s*\{([^{}]*)\}(\^\{?-?[0-9]\}?)?")
DEGREES = re.compile(r"\^\s*\{?\\circ\}?|\\degree|°")
MARK = re.compile(
    rf"{WORDS.pattern}|{DEGREES.pattern}"
    r"|[%$€£¥₹]|(?<=[0-9})])_(?:\{\w+\}|\w)|'+|\^\{?\\prime\}?|\^\{?(?:T|\\top)\}?"
)
# Ways to write the same.
SAME = (
    (re.compile(r"\\([%$])"), r"\1"), (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[,;:! ]|~"), " "), (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\\(?:left|right|[bB]igg?[lr]?)(?![a-z])"), ""),
    (re.compile(r"\\lbrace"), r"\\{"), (re.compile(r"\\rbrace"), r"\\}"),
    (re.compile(r"\\text\s*\{\s*(?:and|or)\s*\}"), ","),
)  # fmt: skip
BOX = re.compile(r"(?:[a-z ,]*\bis:?\s*)?(.*)\\boxed\s*(\{.*)", re.IGNORECASE | re.DOTALL)
BRACKET = re.compile(r"\\?[{}]|[()\[\],]")
RELATION = re.compile(r"[<>≤≥]|\\[lg]eq?(?![a-z])")  # x < 2 is (-\infty, 2)
EVALUATED = re.compile(r"(Integer|Float|Symbol) \('?([\w.]+)'? \)|E ")  # as sympy writes it


def judge(gold, answer):
    """Whether an answer equals the gold one. Called in the judge's process."""
    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable(logging.WARNING)  # that there is no time limit, which there is
    with without_eval("sympy.parsing", number_or_name):
        gold, answer = (
            parse(rf"\boxed{{{text}}}", [LatexExtractionConfig()], parsing_timeout=None)
            for text in (gold, answer)
        )
        return verify(gold, answer, timeout_seconds=None) and close(gold[0], answer[0])


def close(a, b):
    """Whether what math-verify calls equal is: it rounds numbers to six places, so that 10^-8 is
    2 * 10^-8. Exact numbers have to be the same, others to agree in six digits."""
    import sympy

    if isinstance(a, sympy.FiniteSet) and isinstance(b, sympy.FiniteSet):
        return all(any(close(x, y) for y in b) for x in a)
    if isinstance(a, sympy.Tuple | sympy.Interval) and isinstance(b, type(a)):
        return all(map(close, a.args, b.args))
    if isinstance(a, sympy.MatrixBase) and isinstance(b, sympy.MatrixBase):
        return all(map(close, a.flat(), b.flat()))
    if not all(isinstance(x, sympy.Expr) and x.is_number for x in (a, b)):
        return True
    a, b = a.doit(), b.doit()
    if a.is_Rational and b.is_Rational and not (a.is_Float or b.is_Float):
        return a == b
    size = max(abs(sympy.N(a)), abs(sympy.N(b)))
    return bool(abs(sympy.N(a - b, 30)) <= 1e-6 * size) or bool(size < 1e-30)


def number_or_name(code, *_):
    import sympy

    kind, text = EVALUATED.fullmatch(code).groups()
    return getattr(sympy, kind)(text) if kind else sympy.E


def compared(gold, answer):
    """Whether two answers are equal, as text or as numbers. Where that does not tell, and nothing
    differs that math-verify passes over: the two texts that it is asked about."""
    gold, answer = plain(gold), plain(answer)
    if not answer:
        return False
    if gold == answer or same_words(gold, answer):
        return True
    (number, unit), (value, _) = measured(gold), measured(answer)
    marks = Counter(map(mark, MARK.finditer(answer)))
    bare, bare_gold = MARK.sub("", answer), MARK.sub("", gold)
    if None not in (number, value) and not unit and measured(bare) == (value, ""):
        return value == number and not any(m[0] in "%_'^" for m in marks)  # a unit at most
    if (
        ":" in gold + answer
        or marks != Counter(map(mark, MARK.finditer(gold)))
        or (brackets(bare) != brackets(bare_gold) and not RELATION.search(bare + bare_gold))
        or other_case(bare, bare_gold)
    ):
        return False
    if measured(bare) != (None, "") and measured(bare_gold) != (None, ""):
        return measured(bare) == measured(bare_gold)
    return bare_gold, bare


@lru_cache(maxsize=4096)  # accuracy and rewards ask about the same answers
def equal(gold, answer):
    """Whether two answers are equal, to math-verify where need be."""
    equal = compared(gold, answer)
    return equal if isinstance(equal, bool) else JUDGE(*equal) is True


def plain(text):
    r"""An answer without its wrappers, \boxed{ } included wherever it stands, and with one spelling
    of what LaTeX has several for; "" where there are two boxes."""
    text = unwrapped(text)
    if text.count(r"\boxed") > 1:
        return ""
    if match := BOX.fullmatch(text):
        inside, depth = match[2], 0
        for end, character in enumerate(inside):
            depth += (character == "{") - (character == "}")
            if depth == 0:
                text = match[1] + inside[1:end] + inside[end + 1 :]
                break
        text = unwrapped(text)
    if (text.count("$") - text.count(r"\$")) % 2 == 0:
        text = re.sub(r"(?<!\\)\$", "", text)
    for pattern, same in SAME:
        text = pattern.sub(same, text)
    return re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", text)


def mark(match):
    """One way to write what MARK finds: "°" for degrees, "$" for dollars, "_2" for _{2}."""
    text = match[0]
    if DEGREES.fullmatch(text):
        return "°"
    if word := WORDS.match(text):
        inside = " ".join(word[1].split())
        text = ONE_UNIT.get(inside.lower(), inside) + (word[2] or "")
    return text.replace("{", "").replace("}", "").replace(r"^\prime", "'")


def brackets(text):
    """How often which pair of brackets holds a list; sets, which lists without any are, aside."""
    found, open_ones = Counter(), []
    for token in BRACKET.findall(text):
        if token in ("(", "[", "{", r"\{"):
            open_ones.append([token, False])
        elif open_ones and token == ",":
            open_ones[-1][1] = True
        elif open_ones:
            left, is_list = open_ones.pop()
            found[left + token] += is_list and left not in ("{", r"\{")
    return +found


def same_words(gold, answer):
    """Whether both are the same words, upper and lower case aside; "ab" may be a product."""
    words, written = (text.lower().split() for text in (gold, answer))
    return words == written and all(word.isalpha() and len(word) > 3 for word in words)


def other_case(text, other):
    """Whether a letter of one stands in the other in upper or lower case alone: x is not X."""
    a, b = (set(re.sub(r"\\[A-Za-z]+", "", x)) for x in (text, other))
    return any(c.swapcase() in b for c in a - b if c.isalpha())


def judge_request(completion, problem):
    """What the judge may be asked about a completion; None where it is not."""
    answer = extract_answer(completion)
    equal = bool(answer) and len(answer) <= LONGEST and compared(problem.answer, answer)
    return None if isinstance(equal, bool) else equal


def is_correct(completion, problem):
    """Whether the answer in the tags equals the gold answer, as text, as numbers or as LaTeX."""
    answer = extract_answer(completion)
    return bool(answer) and len(answer) <= LONGEST and equal(problem.answer, answer)


def correctness(completion, problem):
    """2.0 for the right answer, else 0."""
    return 2.0 if is_correct(completion, problem) else 0.0


REWARD_FUNCTIONS = [correctness, strict_format, soft_format, tag_count]
