r"""The writings in which a right expression is right, and wrong ones stay wrong."""

import random
import time

import pytest

from rldatasets import Problem
from tasks.countdown import REWARD_FUNCTIONS, correctness, each_number_once, is_correct
from tasks.expressions import parsed


def judged(numbers, target, text):
    problem = Problem("?", "", "", {"numbers": sorted(numbers), "target": target})
    return is_correct(f"<reasoning>\nSo.\n</reasoning>\n<answer>\n{text}\n</answer>\n", problem)


@pytest.mark.parametrize(
    ("numbers", "target", "text"),
    [
        # results behind it
        ([19, 36, 55, 7], 65, "55 + 36 - 19 - 7 = 65"), ([3, 5], 15, "3*5=15"),
        ([3, 4, 5], 35, "(3 + 4) * 5 = 7 * 5 = 35"), ([6, 4], 10, "6 + 4 = 10."),
        ([9, 2, 7], 25, "**9 * 2 + 7 = 25**"), ([8, 2], 4, "8 ÷ 2 ＝ 4"),
        # other signs
        ([3, 5], 15, "3 × 5"), ([3, 5], 15, "3 · 5"), ([3, 5], 15, "3 ⋅ 5"), ([3, 5], 15, "3 x 5"),
        ([3, 5], 15, "3 ∗ 5"), ([3, 5], 15, "3 ✕ 5"), ([8, 2], 4, "8 ÷ 2"), ([8, 2], 4, "8 ∕ 2"),
        ([9, 4], 5, "9 − 4"), ([9, 4], 5, "9 – 4"), ([9, 4], 13, "9 ＋ 4"),
        ([9, 4, 2], 26, "（9 + 4） × 2"), ([9, 4, 2], 26, "[9 + 4] * 2"),
        ([9, 4, 2, 1], 27, "[(9 + 4) * 2] + 1"), ([9, 4, 2, 1], 25, "{[9 + 4] × 2} − 1"),
        # LaTeX and Markdown
        ([3, 5], 15, r"$3 \times 5$"), ([3, 5], 15, r"\(3 \cdot 5\)"), ([8, 2], 4, r"8 \div 2"),
        ([3, 5], 15, r"\boxed{3 \times 5 = 15}"), ([3, 5], 15, "`3 * 5`"), ([3, 5], 15, "**3*5**"),
        ([9, 4, 2], 26, r"$\left(9 + 4\right) \times 2 = 26$"), ([3, 5], 15, "3 * 5."),
        ([8, 2, 3], 12, r"\frac{8}{2} \times 3"), ([9, 3, 2], 6, r"\dfrac{9 + 3}{2}"),
        ([6, 8, 2], 24, r"6 * \frac{8}{2}"), ([24, 8, 2], 6, r"24 / \frac{8}{2}"),
    ],
)  # fmt: skip
def test_a_right_expression_is_right_in_other_writings(numbers, target, text):
    assert judged(numbers, target, text)


@pytest.mark.parametrize(
    ("numbers", "target", "text"),
    [
        ([19, 36, 55, 7], 65, "55 + 36 - 19 - 7 = 66"), ([19, 36, 55, 7], 65, "65"),
        ([19, 36, 55, 7], 65, "65 = 65"), ([19, 36, 55, 7], 65, "55 + 36 = 65"),
        ([3, 4, 5], 35, "7 * 5 = (3 + 4) * 5"), ([3, 4, 5], 35, "(3 + 4) * 5 = 7 * 4 = 35"),
        ([3, 4, 5], 35, "3 + 4 + 5 = 35"), ([3, 5], 15, "3 * 5 ="), ([3, 5], 15, "= 3 * 5"),
        ([3, 5], 15, "3 * 5 == 15"), ([3, 5], 15, "x = 3 * 5"), ([3, 5], 15, "3 * 5 = 15 = 16"),
        ([3, 5], 15, "3 5"), ([3, 5], 15, "3(5)"), ([3, 5], 15, "3 ^ 5"), ([3, 5], 15, "3 ** 5"),
        ([9, 4, 2], 26, "[9 + 4) * 2"), ([9, 4, 2], 26, "(9 + 4} * 2"), ([9, 4], -5, "4 − 9 = 5"),
        ([3, 5], 15, "3 xx 5"), ([3, 5], 15, "3 times 5"), ([3, 5], 15, r"3 \sqrt 5"),
        ([8, 2], 4, r"\frac82"), ([8, 2], 4, r"\frac{8}"), ([8, 2], 4, r"\frac{8}{2"),
        ([24, 8, 2], 6, "24 / 8 / 2"), ([8, 0], 4, r"\frac{8}{0}"), ([8, 2], 4, r"\left 8 / 2 x"),
        ([1, 2], 0.5, "½"), ([3, 5], 15, "3 * 5 or 5 * 3"), ([3, 5], 15, "$3 * 5$ $3 * 5$"),
        ([3, 5], 15, r"\boxed{3 * 5} \boxed{5 * 3}"), ([3, 2], 9, "3²"), ([3, 5], 15, "３ * ５"),
        ([3, 5], 15, "3 * 5!"), ([3, 5], 15, "3 * 5 = 15.0"), ([3, 5], 15, "3 * 5 ≈ 15"),
    ],
)  # fmt: skip
def test_what_is_no_expression_that_reaches_the_target_is_wrong(numbers, target, text):
    assert not judged(numbers, target, text)


def test_a_false_result_pays_nothing_for_the_numbers_either():
    problem = Problem("?", "", "", {"numbers": [3, 4, 5], "target": 35})
    paid = {
        text: [f(f"<answer>{text}</answer>", problem) for f in (correctness, each_number_once)]
        for text in ("3 + 4 + 5", "3 + 4 + 5 = 12", "3 + 4 + 5 = 35", "(3 + 4) * 5 = 34")
    }
    assert list(paid.values()) == [[0.0, 0.5], [0.0, 0.5], [0.0, 0.0], [0.0, 0.0]]


def test_every_sign_reads_as_its_plain_one_in_random_expressions():
    rng = random.Random(0)
    others = {"*": "×·⋅x", "/": "÷∕", "-": "−–", "+": "＋", "(": "（", ")": "）"}
    for _ in range(2000):
        plain = "7" + "".join(
            rng.choice("+-*/")
            + rng.choice(["", "("])
            + str(rng.randint(1, 20))
            + rng.choice(["", ")"])
            for _ in range(4)
        )
        written = "".join(rng.choice(others[c]) if c in others else c for c in plain)
        assert parsed(written) == parsed(plain), written


@pytest.mark.parametrize("unit", ["\\frac{", "\\left(", "1=", "=", "{", "[(", "×", "\\frac{1}{1}"])
def test_a_megabyte_of_these_takes_no_time(unit):
    problem = Problem("?", "", "", {"numbers": [3, 4, 5], "target": 35})
    for size in (190, 1_000_000):
        text = f"<answer>{unit * (size // len(unit))}</answer>"
        for function in REWARD_FUNCTIONS:
            started = time.thread_time()
            assert function(text, problem) >= 0
            assert time.thread_time() - started < 0.05
