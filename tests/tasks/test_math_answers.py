r"""LaTeX answers: right in the usual writings, and what math-verify passes over stays wrong."""

from importlib import util

import pytest

from rldatasets import Problem
from tasks.verifier_process import Judge

if not util.find_spec("math_verify"):
    pytest.skip("pip install math-verify==0.9.0 for these tests", allow_module_level=True)

from tasks import math as task

RIGHT = {  # gold, the answers
    "5": r"\boxed{5} | $5$ | **5** | $\boxed{5}$ | The answer is $\boxed{5}$. | x = \boxed{5} | "
    r"x=5 | \boxed{5}\text{ km} | 5\text{ km} | 5\,\mathrm{cm} | 5\text{ cm}^2 | 5^\circ | \$5 | "
    r"5.0 | \frac{10}{2} | \sqrt{25}",
    "-5": r"-\boxed{5} | \boxed{-5} | -5.0",
    "0.75": r"\frac{3}{4} | \frac{6}{8} | 75/100",
    r"2\frac{1}{2}": r"2.5 | \frac52",
    r"50\%": r"50\% | 50% | \frac{100}{2}\% | 50 \text{ percent}",
    r"\$18.90": r"\$18.9 | 18.90\text{ dollars}",
    r"5\text{ km}": r"5\text{ km} | 5.0\,\mathrm{km} | \boxed{5}\text{ km}",
    r"90^\circ": r"90° | 90^{\circ} | 90\text{ degrees}",
    "3:2": r"3:2 | 3 : 2 | $3:2$ | \boxed{3:2}",
    "12:45": r"12:45 | 12:45.",
    "(1,2)": r"(1, 2) | \left(1,2\right) | \left( 1, \frac{4}{2} \right)",
    r"\{1,2\}": r"\{2,1\} | 1,2 | \left\{1, 2\right\} | \lbrace 1,2\rbrace",
    "(1,2),(3,4)": r"(3,4),(1,2) | \{(1,2),(3,4)\}",
    "[0,1)": r"[0, 1) | \left[0, 1\right)",
    "x<2": r"x < 2 | 2 > x | (-\infty,2)",
    "5,6": r"6, 5 | 5 \text{ or } 6 | 5\text{ and }6",
    "1011_2": r"1011_{2} | $1011_2$",
    r"\frac{1}{2004!}": r"\frac{1}{2004!} | 1/2004!",
    "2x": r"2x | x\cdot 2 | 2 x | x + x",
    r"\text{Evelyn}": r"Evelyn | evelyn. | \text{Evelyn} | **Evelyn**",
    "B": r"(B) | \text{(B)} | B. | \textbf{(B)}",
    r"\sqrt{2}": r"\sqrt2 | 1.414214",
    r"\frac{1}{2}, \sqrt{2}": r"\sqrt{2}, 0.5 | 1.414214, 0.5",
    "10^{-20}": r"\frac{1}{10^{20}} | 10^{-20}",
}
WRONG = {
    # what is passed over
    "12:45": "12:30 | 12 | 45 | 12:45:30",
    "3:2": r"3:1 | 3 | \frac32 | 6:5",
    "1:2:3": "1:2:4 | 1:2 | 1",
    r"50\%": r"50 | 0.5 | \frac12 | 5\% | 50^\circ",
    "50": r"0.5 | 50\% | 51",
    "0.5": r"50\% | 0.5\% | 5",
    r"5\text{ km}": r"5\text{ mm} | 5 | 5\mathrm{m} | 6\text{ km} | 5\text{ km}^2",
    r"9\text{ AM}": r"9\text{ PM} | 9 | 9 AM PM",
    r"2\text{ A}": r"2\text{ B} | 2 | 2A",
    r"5\text{ m}^2": r"5\text{ m} | 5\text{ m}^3 | 5 | 25",
    r"\$5": r"5 | €5 | 5\% | 5\text{ cents}",
    r"90^\circ": r"90 | \frac{\pi}{2} | 90\% | 90'",
    "2x": "2 | 2y | 2X | x | x2y",
    "5i": "5 | 5j | -5i",
    "-3y": "-3 | 3y | -3Y",
    "x": "X | y | 1",
    "1011_2": "1011_3 | 1011 | 11 | 1010_2",
    "x'": "x | x''",
    "A^T": "A",
    "(1,2)": r"\{1,2\} | [1,2] | 1,2 | (2,1) | {1,2} | (1,2] | (1,3)",
    r"\{1,2\}": r"(1,2) | [1,2] | \{1,3\} | \{1,2,3\}",
    "(1,2),(3,4)": r"\{1,2\},\{3,4\} | (1,2) | (1,4),(3,2)",
    "[0,1)": "(0,1] | [0,1] | (0,1)",
    "x<2": r"x>2 | x\le 2 | (-\infty,2] | (2,\infty) | x<3",
    # several answers
    "5": r"\boxed{5}\boxed{6} | \boxed{5} or 6 | 5, 6 | 5 \text{ or } 6 | \pm 5 | not \boxed{5} | "
    r"\boxed{5}\boxed{5} | 5 6 | 5!| 5\text{ thousand} | 5\text{ or six} | 5_3 | 5:1 | 5 km",
    r"\{5,6\}": r"\boxed{5}\boxed{6} | 5",
    "56": "5 6 | 5,6",
    # what rounding hides
    r"\frac{1}{2004!}": r"\frac{1}{2006!} | 0 | 1/2005!",
    "10^{-20}": r"10^{-21} | 0 | 2\cdot 10^{-20}",
    "0.0000001": "0.0000002 | 0",
    "10000.000001": "10000.0000012",
    "(10^{-20},1)": "(10^{-21},1)",
    r"\{10^{-20},1\}": r"\{10^{-21},1\} | 1,10^{-21}",
    r"\frac{1}{3}": "0.333333 | 0.3",
    "3": r"3\text{ hours and }20\text{ minutes}",
    r"\text{even}": r"\text{odd} | 5",
}


def rows(table):
    return [(gold, answer.strip()) for gold, text in table.items() for answer in text.split("|")]


def written(answer):
    return f"<reasoning>\nSo.\n</reasoning>\n<answer>\n{answer}\n</answer>\n"


@pytest.fixture(scope="module", autouse=True)
def judge():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "JUDGE", Judge("tasks.math", seconds=2))
        yield
        task.JUDGE.stop()


@pytest.mark.parametrize(("gold", "answer"), rows(RIGHT))
def test_a_right_answer_in_a_usual_writing_is_right(gold, answer):
    assert task.is_correct(written(answer), Problem("?", gold, ""))


@pytest.mark.parametrize(("gold", "answer"), rows(WRONG))
def test_what_math_verify_passes_over_makes_no_wrong_answer_right(gold, answer):
    assert not task.is_correct(written(answer), Problem("?", gold, ""))


def test_every_gold_answer_equals_itself():
    for gold in {**RIGHT, **WRONG}:
        for form in ("{}", "${}$", r"\boxed{{{}}}"):
            assert task.is_correct(written(form.format(gold)), Problem("?", gold, "")), (form, gold)


def test_only_pure_numbers_are_judged_without_math_verify(monkeypatch):
    asked = []
    monkeypatch.setattr(task, "JUDGE", lambda *request: asked.append(request))
    task.equal.cache_clear()
    for gold, answer in (("2x", "x + x"), ("5", "x = 5"), (r"\sqrt{4}", "2")):
        task.equal(gold, answer)
    assert asked == [("2x", "x+x"), ("5", "x=5"), (r"\sqrt{4}", "2")]
    for gold, answer, right in (("5", "5.0", True), ("5", "6", False), (r"\frac12", "0.5", True),
                                ("12:45", "12:30", False), (r"50\%", "50", False)):  # fmt: skip
        assert task.equal(gold, answer) is right
    assert len(asked) == 3
    task.equal.cache_clear()
