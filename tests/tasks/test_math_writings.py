r"""LaTeX answers as MATH's own files space them, and words that are no units."""

from importlib import util

import pytest

if not util.find_spec("math_verify"):
    pytest.skip("pip install math-verify==0.9.0 for these tests", allow_module_level=True)

from tasks.math import JUDGE, equal

COLUMN = r"\begin{pmatrix} -1 \\ 2 \end{pmatrix}"


@pytest.fixture(scope="module", autouse=True)
def no_process_left():
    yield
    JUDGE.stop()


@pytest.mark.parametrize(("gold", "answer"), [
    (COLUMN, r"\begin{pmatrix}-1\\2\end{pmatrix}"),
    (r"\begin{pmatrix}-1\\2\end{pmatrix}", COLUMN),
    (COLUMN, r"\begin{pmatrix}-1 \\ \frac{4}{2}\end{pmatrix}"),
    (r"\begin{pmatrix} 1 & 0 \\ 0 & 1 \end{pmatrix}", r"\begin{pmatrix}1&0\\0&1\end{pmatrix}"),
    (r"\begin{pmatrix} x \\ y \end{pmatrix}", r"\begin{pmatrix}x\\y\end{pmatrix}"),
    (r"\text{Yes}", "yes"), ("No", r"\text{no}"),
    (r"\emptyset", r"\varnothing"),
    ("5i", r"5\mathrm{i}"), ("2e", r"2\mathrm{e}"), (r"\delta", r"\delta"),
])  # fmt: skip
def test_another_writing_is_right(gold, answer):
    assert equal(gold, answer)


@pytest.mark.parametrize(("gold", "answer"), [
    (COLUMN, r"\begin{pmatrix} 2 \\ -1 \end{pmatrix}"),
    (COLUMN, r"\begin{pmatrix} -1 & 2 \end{pmatrix}"),
    (COLUMN, r"\begin{pmatrix} -1 \\ 2 \\ 0 \end{pmatrix}"),
    ("5", r"5\mathrm{i}"), ("5", r"5\text{e}"), ("3", r"3\text{ x}"),
    (r"\Delta", r"\delta"), (r"2\gamma", r"2\Gamma"), (r"\phi", r"\Phi"), (r"x^\pi", r"x^\Pi"),
    ("5", r"5\ldots"), ("0.3", "0.3..."), ("1,2", r"1,2,\ldots"), (r"1,2,\dots", "1,2"),
    ("Yes", "No"), ("Xx", "x^2"), ("x^2", "Xx"), ("2m", "m+M"),
])  # fmt: skip
def test_what_differs_is_wrong(gold, answer):
    assert not equal(gold, answer)
