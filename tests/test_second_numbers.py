"""A number with a second one in words behind it is no answer, or hedging would earn reward."""

import time

import pytest

from evaluator import answers_match, parse_number

HEDGES = [
    "7 maybe eight", "7 no eight", "7 then eight", "7 but actually eight", "7 eight",
    "7 fifty", "7 thirty pm", "7 feet six inches", "7 hours ten minutes", "7 dollars fifty cents",
    "7 apples six pears", "7 less than ten", "7 in ten", "7 mod three", "7 x ten",
    "7 and-a-half", "7 one-half", "7 feet and-a-quarter", "7 and a dozen",
]  # fmt: skip
OTHER_NUMBERS = [
    "7 twelfths", "7 sixteenths", "7 twentieths", "7 elevenths", "7 quadrillion", "7 mln", "7 kk",
    "7 Mio", "7 mrd",
]  # fmt: skip
ONE_NUMBER = [
    "7 two-liter bottles", "7 five-dollar bills", "7 one-way tickets", "7 dollars per dozen",
    "7 tens", "7 often", "7 tents", "7 weights", "7 eighteen-wheelers",
    "7 sixty-second spots", "7 for one", "7 anyone", "7 networks",
]  # fmt: skip


@pytest.mark.parametrize("answer", [*HEDGES, *OTHER_NUMBERS])
def test_a_second_number_or_another_one_is_no_answer(answer):
    assert parse_number(answer) is None
    assert not answers_match(answer, "7")


@pytest.mark.parametrize("answer", ONE_NUMBER)
def test_words_that_hold_a_number_are_units(answer):
    assert answers_match(answer, "7")


def test_many_words_take_no_time():
    started = time.perf_counter()
    for words in ("and a " * 40, "six-x " * 40, "a" * 200, "and-" * 50, "- " * 90):
        assert parse_number(f"7 {words}"[:64]) in (7, None)
    assert time.perf_counter() - started < 0.05
