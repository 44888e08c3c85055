"""Reward functions, answers and scores; test_reward_parser.py has the tables and the fuzzing."""

import ast

import pytest
from conftest import ROOT
from toys import written

from evaluator import (
    REWARD_FUNCTIONS,
    correctness,
    extract_answer,
    integer_format,
    is_correct,
    is_correct_leniently,
    last_number,
    parse_number,
    soft_format,
    strict_format,
    tag_count,
)
from rldatasets import SYSTEM_PROMPT, Problem

GOLD = Problem("How many?", "72", "")


def total(completion, problem=GOLD):
    return sum(function(completion, problem) for function in REWARD_FUNCTIONS)


# --- numbers -----------------------------------------------------------------------------------

NUMBERS = [
    ("72", 72), (" 72\n", 72), ("72.", 72), ("72.0", 72), ("72.00", 72), ("$72", 72),
    ("1,080", 1080), ("1,234,567", 1234567), ("-5", -5), ("−5", -5), ("$-5", -5), ("-$5", -5),
    ("+5", 5), ("50%", 50), ("50 %", 50), ("72 clips", 72), ("72 clips.", 72), ("€3.50", 3.5),
    ("0", 0), ("-0", 0), ("007", 7), (".5", 0.5), ("0.125", 0.125), ("12 Square Feet", 12),
]  # fmt: skip
NOT_NUMBERS = [
    "72 thousand", "3 Million", "6 dozen", "5k",
    "", " ", "-", "$", ".", ",", "%", "72 or 73", "72, 73", "1,08", "1,0800", ",123", "12,34",
    "1/2", "5-6", "1e300000", "nan", "inf", "Infinity", "x = 72", "about 72", "²", "٣",
    "--5", "-$-5", "0x10", "1_000", "72\u00a073", "7" * 5000, "72!" , "(72)",
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), NUMBERS)
def test_a_number_is_read(text, value):
    assert parse_number(text) == value


@pytest.mark.parametrize("text", NOT_NUMBERS)
def test_what_is_not_one_number_is_none(text):
    assert parse_number(text) is None


# --- answers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (written(), "72"),
        ("<answer>72</answer>", "72"),
        (written() + "By the way, 73.", "72"),
        ("72", None),  # no tags: the text is not the answer
        ("<answer>72", None),
        ("72</answer>", None),
        ("</answer>72<answer>", None),
        (written() + "<answer>73</answer>", None),  # hedging
        ("<answer>72</answer></answer>", None),
        ("<answer><answer>72</answer>", None),
        ("", None),
    ],
)
def test_the_answer_is_what_stands_in_the_one_pair_of_tags(completion, answer):
    assert extract_answer(completion) == answer


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("1080", "1,080", True),
        ("1,080", "1080", True),
        ("-3", "−3", True),
        ("72", "72.0", True),
        ("18", "$18", True),
        ("5", "15", False),
        ("5", "", False),
        ("5", "5 or 6", False),
        ("15", "5", False),
        ("5", "-5", False),
        ("0.5", "0.50", True),
        ("yes", " Yes ", True),
        ("blue  whale", "Blue whale", True),
        ("yes", "yes and no", False),
    ],
)
def test_answers_are_compared_as_numbers_or_else_as_words(gold, answer, right):
    assert is_correct(written(answer), Problem("?", gold, "")) is right


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("He has 48 + 24 = 72 coins.", "72"),
        ("<answer>\n72\n</answer>\n", "72"),
        ("so $1,080.50!", "$1,080.50"),
        ("x = -3", "-3"), ("it is (−3)", "−3"), ("-$5", "-$5"), ("$-5", "-5"),
        ("9 - 3", "3"), ("9-3", "3"), ("page 5-6.", "6"), ("12,34", "34"), ("1/2", "2"),
        ("about .5", ".5"), ("72.", "72"), ("1,000,0001", "0001"),
        ("none", None), ("", None), ("²", None),
    ],
)  # fmt: skip
def test_the_last_number_is_found_as_it_is_written(text, number):
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("completion", "strict", "lenient"),
    [
        (written(), True, True),
        ("48 / 2 = 24, so it is 72.", False, True),  # right, and no format at all
        (written("72 or 73"), False, False),
        (written("73") + "No: 72", False, True),
        (written("72") + "out of 100", True, True),  # lenient is never the stricter
        (written("seventy-two"), False, False),
        ("", False, False),
    ],
)
def test_leniently_the_last_number_counts_tags_or_none(completion, strict, lenient):
    assert is_correct(completion, GOLD) is strict
    assert is_correct_leniently(completion, GOLD) is lenient


# --- reward values -----------------------------------------------------------------------------

PERFECT = {
    "correctness": 2.0, "integer_format": 0.5, "strict_format": 0.5, "soft_format": 0.5,
    "tag_count": 0.5,
}  # fmt: skip


def test_the_five_rewards_and_their_values():
    values = {function.__name__: function(written(), GOLD) for function in REWARD_FUNCTIONS}
    assert values == PERFECT


@pytest.mark.parametrize("reasoning", ["one line", "many\nlines\n\nof reasoning", "x" * 5000])
@pytest.mark.parametrize("ending", ["\n", ""])
def test_the_system_prompt_s_format_earns_every_reward_however_long(reasoning, ending):
    completion = written(reasoning=reasoning).removesuffix("\n") + ending
    assert total(completion) == 4.0


def test_the_example_in_the_system_prompt_itself_has_the_strict_format():
    example = SYSTEM_PROMPT[SYSTEM_PROMPT.index("<reasoning>") :]
    for function in (strict_format, soft_format, tag_count):
        assert function(example, GOLD) == 0.5


@pytest.mark.parametrize(
    ("function", "completion", "value"),
    [
        (integer_format, written("1,080"), 0.5),
        (integer_format, written("-3"), 0.5),
        (integer_format, written("−3"), 0.5),
        (integer_format, written("72.5"), 0.0),
        (integer_format, written("²"), 0.0),
        (integer_format, written("72 clips"), 0.0),
        (integer_format, "72", 0.0),
        (strict_format, "Sure!\n" + written(), 0.0),
        (strict_format, written() + "Done.", 0.0),
        (strict_format, written() + "\n", 0.0),
        (strict_format, written(reasoning=""), 0.0),
        (strict_format, written(answer=" "), 0.0),
        (strict_format, written().replace("</reasoning>\n", "</reasoning>\n\n"), 0.0),
        (strict_format, written().replace("\n", ""), 0.0),
        (strict_format, written(reasoning="<answer>\n1\n</answer>"), 0.0),
        (soft_format, written().replace("\n", ""), 0.5),
        (soft_format, "Sure! " + written() + "Done.", 0.5),
        (soft_format, "<answer>72</answer><reasoning>r</reasoning>", 0.0),
        (soft_format, written() + written(), 0.0),
        (tag_count, "", 0.0),
        (tag_count, "<reasoning>\nr", 0.125),
        (tag_count, "<reasoning>\nr\n</reasoning>\n<answer>\n72", 0.375),
        (tag_count, "<reasoning> r\n</reasoning>\n<answer>\n72\n</answer>", 0.375),
        (tag_count, written() + "a" * 100, 0.4),
        (tag_count, written() + "a" * 100_000, 0.0),
        (tag_count, written().rstrip() + " and so on", 0.375 - 0.009),
        (tag_count, "<reasoning>\n" * 5, 0.0),
        (correctness, "72", 0.0),
        (correctness, written("73"), 0.0),
    ],
)
def test_reward_table(function, completion, value):
    assert function(completion, GOLD) == pytest.approx(value)


def test_no_reward_depends_on_the_length_of_the_reasoning():
    for unfinished in (False, True):  # the original taxed a missing newline by the whole length
        rewards = set()
        for length in (1, 10, 1000):
            completion = written(reasoning="r" * length)
            if unfinished:
                completion = completion.replace("\n</answer>\n", "</answer>")
            rewards.add(total(completion))
        assert len(rewards) == 1


def test_a_wrong_answer_never_outranks_the_right_one_of_the_same_form():
    forms = [written, lambda a: f"<answer>{a}</answer>", lambda a: written(a) + "More text."]
    for form in forms:
        assert total(form("72")) == total(form("73")) + 2.0


# --- scoring -----------------------------------------------------------------------------------


# --- safety ------------------------------------------------------------------------------------


def test_reward_functions_need_the_standard_library_alone():
    tree = ast.parse((ROOT / "evaluator.py").read_text())
    names = {function.__name__ for function in REWARD_FUNCTIONS}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name in names:
            used = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            assert not used & {"torch", "sample_rollouts", "chat_prompt"}
