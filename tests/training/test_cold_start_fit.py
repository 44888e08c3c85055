"""What a cold start leaves out: solutions that GRPO would cut off."""

from dataclasses import replace

import pytest
from conftest import TASK, make_args, make_setup, make_tokenizer

from rldatasets import Problem, Problems
from sampling.turns import worked_ids
from training.cold_start import fitting

TASK = replace(TASK, worked_answer=lambda problem: problem.solution)


def kept(solutions, most, capsys):
    """(the solutions that a cold start teaches, what it says)."""
    setup = make_setup(None, make_args(max_completion_length=most), None, make_tokenizer(), TASK)
    problems = Problems([Problem("?", "1", solution) for solution in solutions], 3)
    fit = fitting(setup, problems, worked_ids)
    assert fit.seed == 3
    return [problem.solution for problem in fit], capsys.readouterr().out


@pytest.mark.parametrize(
    ("solutions", "most", "left"),  # a character each is a token, and so is the end
    [
        (["123", "1234", "12345", "1"], 5, ["123", "1234", "1"]), (["12", "123"], 3, ["12"]),
        (["x" * 40, "y", "z" * 39], 40, ["y", "z" * 39]), (["", "xy"], 1, [""]),
        (["xy"] * 9 + ["x"], 2, ["x"]),
    ],
)  # fmt: skip
def test_solutions_that_would_be_cut_off_are_left_out_and_counted(solutions, most, left, capsys):
    fit, said = kept(solutions, most, capsys)
    assert fit == left
    count = len(solutions) - len(left)
    assert said == (
        f"cold start: {count} of {len(solutions)} worked solutions left out: they are longer than "
        f"--max_completion_length {most}\n"
    )


def test_nothing_is_said_where_all_fit_and_they_are_the_same_stream(capsys):
    assert kept(["1", "12"], 3, capsys) == (["1", "12"], "")


def test_where_none_fits_all_are_taught_and_that_is_told(capsys):
    fit, said = kept(["123", "1234"], 2, capsys)
    assert fit == ["123", "1234"]
    assert "2 of 2 worked solutions are longer than --max_completion_length 2" in said
