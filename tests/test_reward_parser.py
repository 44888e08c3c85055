"""Answer parsing and rewards: a long table, fuzzed text, and a megabyte of what slows parsers."""

import math
import random
import re
import time
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluator import (
    LONGEST_NUMBER,
    REWARD_FUNCTIONS,
    TAGS,
    as_words,
    extract_answer,
    is_correct,
    is_correct_leniently,
    measured,
    parse_number,
)
from rldatasets import Problem

HIGHEST = {
    "correctness": 2.0, "integer_format": 0.5, "strict_format": 0.5, "soft_format": 0.5,
    "tag_count": 0.5,
}  # fmt: skip


def written(answer="72", reasoning="48 / 2 = 24"):
    return f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}\n</answer>\n"


def rewards(completion, gold="72"):
    problem = Problem("?", gold, "")
    return {function.__name__: function(completion, problem) for function in REWARD_FUNCTIONS}


# --- tables ------------------------------------------------------------------------------------

NUMBERS = {  # text: what it states; separated by |
    "0|00|0.|.0|-0|+0|$0|0%|0 apples|0.000": 0,
    "5|05|+5|5.|5.0|5.00|$5|£5|€5|$5.00|+$5|5%|5 %|5 %.|5 apples|5apples|5 Apples.|5 pm": 5,
    " 5|5 |\t5\n|\u20035\u00a0|5 x|5 USD|5 red apples|5 kilometres|5 km|5 e"
    "|5 €|5$|¥5|5°C|5 m²|5 km/h|**5**|5e0": 5,
    "-5|−5|-$5|$-5|−€5|€−5|-5.0|-5 degrees|−5%": -5,
    "0.5|.5|0.50|$.5|+.5|.5%|00.5|.500 litres": 0.5,
    "-0.25|-.25|−.25|$-.25|-$.25": -0.25,
    "1000|1,000|1,000.|1,000.0|1e3|10^3|$1,000|£1,000.00|1,000 clips|01,000|1000.000": 1000,
    "1234567|1,234,567|$1,234,567.00|1,234,567 people": 1234567,
    "-12,345.75|−$12,345.75|-12345.75": -12345.75,
    "3 hundredweights|3 kits|3 dozenth|3 halfpennies|3 quarters|3 times|3 more|3 less than before"
    "|3 cats and dogs|3 for one|3 feet squared|3 by noon|3 cats or so|3 andes|3 cats and tents": 3,
}
NOT_NUMBERS = (  # separated by |
    "|-|+|$|%|.|,|−|$-|-.|five|a|x5|A5|#5|= 5|5 =|(5)|[5]|5!|5?|5;|5:30|5/1|1/2|5 1/2|5½|½|²"
    "|5 or 6|5 and 6|5, 6|5 - 6|5-6|5 6|5.5.5|1.2.3|- 5|--5|+-5|-+5|$$5|$-$5|$5 €|5%%|-$-5"
    "|1,00|1,0000|10,00|1,000,|,100|,1,000|1,,000|0001,000|12,34,567|1 000|1'000|1_000|1.000,50"
    "|1e300000|0x10|0b1|nan|NaN|inf|-inf|Infinity|None|true|5k|5 k|5K|5 thousand"
    "|3 thirds|3 thousandths of a mile|3 halves|3 and a half|3 hours and a half|3 hundredths"
    "|4 squared|2 cubed|2 divided by three|7 or eight|20 less two|2 times three|3 point five"
    "|5 plus\ttwo|5 hours and thirty minutes|5 minus fourteen|3 AND A QUARTER|6 cats or seven"
    "|5 thousands|2 dozen|2 dozens|5 hundred|3 million|3 Millions|1.5 billion|2 trillion|1,000 k"
    "|５|٣|四|x = 5|about 5|USD 5|<5>|5\x00|\ufeff5|5\u200b|'5'|\"5\""
    "|there are 5|roughly 5 apples"
)


@pytest.mark.parametrize(("texts", "value"), NUMBERS.items())
def test_what_states_one_number(texts, value):
    for text in texts.split("|"):
        assert parse_number(text) == value, text
        assert is_correct(written(text), Problem("?", str(value), "")), text
        assert not is_correct(written(text), Problem("?", str(value + 1), "")), text


@pytest.mark.parametrize("text", NOT_NUMBERS.split("|"))
def test_what_states_none_or_several(text):
    assert parse_number(text) is None
    assert not is_correct(written(text), Problem("?", "5", ""))


def test_a_number_of_more_than_64_characters_is_none():
    assert parse_number("9" * LONGEST_NUMBER) == 10**LONGEST_NUMBER - 1
    assert parse_number("9" * LONGEST_NUMBER + "9") is None
    assert parse_number(" " * 1000 + "5" + "\n" * 1000) == 5


R, R_END, A, A_END = TAGS
ANSWERS = [  # completion, answer
    (f"{A}5{A_END}", "5"), (f"{A}{A_END}", ""), (f"{A} \n {A_END}", ""), (f"{A}\n5\n{A_END}", "5"),
    (f"so {A}5{A_END} yes", "5"), (f"{A}a < b > c{A_END}", "a < b > c"), (f"{A}{R}{A_END}", R),
    (f"{A}5{A_END}{R}", "5"), (f"{R_END}{A}5{A_END}", "5"), (f"{A}</ answer>{A_END}", "</ answer>"),
    ("5", None), ("", None), (A, None), (A_END, None), (f"{A}5", None), (f"5{A_END}", None),
    (f"{A_END}5{A}", None), (f"{A}5{A_END}{A}", None), (f"{A}5{A_END}{A_END}", None),
    (f"{A}{A}5{A_END}", None), (f"{A}5{A_END}{A}6{A_END}", None), ("<ANSWER>5</ANSWER>", None),
    ("< answer>5</answer>", None), ("<answer >5</answer>", None), (f"<answer{A_END}", None),
    ("&lt;answer&gt;5&lt;/answer&gt;", None), (f"{R}5{R_END}", None),
]  # fmt: skip


@pytest.mark.parametrize(("completion", "answer"), ANSWERS)
def test_the_answer_of_a_text(completion, answer):
    assert extract_answer(completion) == answer


GOLDS = [  # gold, answer, right
    ("5", "5", True), ("5", "5.0", True), ("5", "05", True), ("5", "$5", True), ("5", "six", False),
    ("5", "50", False), ("5", "0.5", False), ("5", "-5", False), ("-5", "5", False),
    ("-5", "−5", True), ("1,000", "1000", True), ("1000", "1,000", True), ("1,000", "1", False),
    ("0", "", False), ("0", "0", True), ("0", "-0", True), ("0.1", "0.10", True),
    ("0.1", "0.1000000000000000055", False), ("0.3", "0.30000000000000004", False),
    ("5 apples", "5", False), ("5 apples", "5 pears", False), ("$5", "5 dollars", True),
    ("yes", "yes", True), ("yes", "YES", True), ("yes", "yes.", True), ("yes", "", False),
    ("New  York", "new\nyork", True), ("New York", "NewYork", False), ("1/2", "1/2", True),
    ("1/2", "0.5", True), ("5:30 pm", "5:30 PM", True), ("Straße", "STRASSE", False),
    ("9" * 65, "9" * 65, True), ("nan", "nan", True), ("²", "²", True), ("²", "2", False),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "answer", "right"), GOLDS)
def test_an_answer_against_the_gold_one(gold, answer, right):
    assert is_correct(written(answer), Problem("?", gold, "")) is right
    assert rewards(written(answer), gold)["correctness"] == 2.0 * right


VALUES = [  # completion; correctness, integer, strict and soft format, tag count
    (written(), (2.0, 0.5, 0.5, 0.5, 0.5)),
    (written().rstrip(), (2.0, 0.5, 0.5, 0.5, 0.5)),
    (written(reasoning="a\n\nb"), (2.0, 0.5, 0.5, 0.5, 0.5)),
    (written("72.0"), (2.0, 0.0, 0.5, 0.5, 0.5)),
    (written("$72"), (2.0, 0.0, 0.5, 0.5, 0.5)),
    (written("+72"), (2.0, 0.5, 0.5, 0.5, 0.5)),
    (written("71"), (0.0, 0.5, 0.5, 0.5, 0.5)),
    (written("7,2"), (0.0, 0.0, 0.5, 0.5, 0.5)),
    (written("72 or 73"), (0.0, 0.0, 0.5, 0.5, 0.5)),
    (written("seventy-two"), (0.0, 0.0, 0.5, 0.5, 0.5)),
    (written(""), (0.0, 0.0, 0.0, 0.5, 0.5)),
    (written(reasoning=" "), (2.0, 0.5, 0.0, 0.5, 0.5)),
    (" " + written(), (2.0, 0.5, 0.0, 0.5, 0.375)),
    ("\n" + written(), (2.0, 0.5, 0.0, 0.5, 0.5)),
    ("So:\n" + written(), (2.0, 0.5, 0.0, 0.5, 0.5)),
    (written() + "\n", (2.0, 0.5, 0.0, 0.5, 0.5)),
    (written() + "Done.", (2.0, 0.5, 0.0, 0.5, 0.495)),
    (written() + "x" * 499, (2.0, 0.5, 0.0, 0.5, 0.001)),
    (written() + "x" * 501, (2.0, 0.5, 0.0, 0.5, 0.0)),
    (written() * 2, (0.0, 0.0, 0.0, 0.0, 0.0)),
    (written().replace("\n", ""), (2.0, 0.5, 0.0, 0.5, 0.0)),
    (written().replace("\n", "\r\n"), (2.0, 0.5, 0.0, 0.5, 0.0)),
    (written().replace(R, ""), (2.0, 0.5, 0.0, 0.0, 0.375)),
    (written().replace(A_END, ""), (0.0, 0.0, 0.0, 0.0, 0.375)),
    (f"{A}\n72\n{A_END}\n{R}\nr\n{R_END}", (2.0, 0.5, 0.0, 0.0, 0.474)),
    (f"{R}{R_END}{A}72{A_END}", (2.0, 0.5, 0.0, 0.5, 0.0)),
    (f"{R}\n{A}\n72\n{A_END}\n{R_END}", (2.0, 0.5, 0.0, 0.0, 0.488)),
    (f"{A}72{A_END}", (2.0, 0.5, 0.0, 0.0, 0.0)),
    ("\n".join(TAGS), (0.0, 0.0, 0.0, 0.5, 0.5)),
    ("".join(TAGS), (0.0, 0.0, 0.0, 0.5, 0.0)),
    ("72", (0.0, 0.0, 0.0, 0.0, 0.0)),
    ("", (0.0, 0.0, 0.0, 0.0, 0.0)),
]


@pytest.mark.parametrize(("completion", "values"), VALUES)
def test_the_five_rewards_of_a_completion(completion, values):
    assert tuple(rewards(completion).values()) == pytest.approx(values)


# --- fuzzing -----------------------------------------------------------------------------------

STRINGS_AT_ONCE = 100
PIECES = [
    *TAGS, *TAGS, "\n", "\n", " ", "7", "72", ",", "-", "−", "$", "%", ".", "<", "/", "answer>",
    "²", "٣", "e9", "nan", "\x00", "\ud800", "\u2028", "İ",
]  # fmt: skip


@settings(max_examples=110, deadline=None, derandomize=True)
@given(st.integers(0, 2**32), st.lists(st.text(max_size=6), max_size=8))
def test_no_text_makes_a_reward_raise_leave_its_range_or_contradict_another(seed, found):
    """110 examples of 100 strings, from tags, the parser's own letters and whatever is found."""
    rng = random.Random(seed)
    pieces = [*PIECES, *found]
    for _ in range(STRINGS_AT_ONCE):
        completion, gold = (
            "".join(rng.choices(pieces, k=rng.randint(0, longest))) for longest in (12, 4)
        )
        if rng.random() < 0.5:
            completion = written(completion, "".join(rng.choices(pieces, k=2)))
        values = rewards(completion, gold)
        for name, value in values.items():
            assert type(value) is float and math.isfinite(value)
            assert 0.0 <= value <= HIGHEST[name]
        problem = Problem("?", gold, "")
        assert is_correct_leniently(completion, problem) or not is_correct(completion, problem)
        answer = extract_answer(completion)
        number = parse_number(completion)
        assert number is None or number.is_finite()
        if values["strict_format"]:
            assert values["soft_format"] and values["tag_count"] == 0.5
        if values["soft_format"] or values["correctness"] or values["integer_format"]:
            assert answer is not None
        if values["integer_format"] and len(answer) <= LONGEST_NUMBER:
            assert parse_number(answer) % 1 == 0
        if parse_number(gold) is None and values["correctness"]:
            assert as_words(answer) == as_words(gold) or measured(gold)[0] is not None


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**32))
def test_a_number_written_in_any_way_reads_as_itself_and_nothing_else(seed):
    rng = random.Random(seed)
    for _ in range(50):
        places = rng.choice([0, 0, 1, 2, 5])
        value = Decimal(rng.randint(-(10 ** rng.randint(1, 15)), 10**15)).scaleb(-places)
        size = f"{abs(value):{rng.choice(['', ','])}.{places}f}"
        sign = rng.choice("-−") if value < 0 else rng.choice(["", "+"])
        sign = "".join(rng.sample([sign, rng.choice(["", "$", "€", "£"])], k=2))
        if not re.fullmatch(r"[-−+]?[$€£]?|[$€£][-−]", sign):  # "$+5" is nobody's way
            continue
        tail = rng.choice(["", "", ".0" * (places == 0), "%", " %", " apples", " square feet."])
        text = rng.choice(["", " "]) + sign + size + tail + rng.choice(["", "\n"])
        assert parse_number(text) == value, text
        assert is_correct(written(text), Problem("?", str(value), ""))
        assert not is_correct(written(text), Problem("?", str(value + 1), ""))


def test_the_answer_is_that_of_a_plain_search():
    """Against a reference that lists every tag in order."""
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choices([A, A_END, "<answer", "5", " ", "/", ">"], k=rng.randint(0, 8)))
        found = [(m.group(), m.start(), m.end()) for m in re.finditer("</?answer>", text)]
        in_order = [tag for tag, _, _ in found] == [A, A_END]
        expected = text[found[0][2] : found[1][1]].strip() if in_order else None
        assert extract_answer(text) == expected, text


# --- a megabyte --------------------------------------------------------------------------------

UNITS = [
    "<reasoning>\n", "</reasoning>", "<answer>", "</answer>\n<answer>", "\n</reasoning>\n<answer",
    "<answer", "</answer", "<", "</", ">", "9", "9,", "9,999", "9.", "-", "−", "$", "%", "\n", " ",
    "\u2003", " a", "a\n", "5 k", "İ", "\n</reasoning>\n<answer>\n", written(),
]  # fmt: skip


def cpu_seconds(function, *arguments):
    """The least of up to five calls: whoever shares the machine does not count."""
    seconds = math.inf
    for _ in range(5):
        started = time.process_time()
        function(*arguments)
        seconds = min(seconds, time.process_time() - started)
        if seconds < 0.05:
            break
    return seconds


@pytest.mark.parametrize("unit", UNITS, ids=ascii)
def test_a_megabyte_of_adversarial_text_takes_no_time(unit):
    """Bare, as the answer, and around one; a quadratic function would take minutes."""
    bulk = unit * (1_000_000 // len(unit))
    half = bulk[: len(bulk) // 2]
    for text in (bulk, written(bulk), written(reasoning=half) + half):
        assert cpu_seconds(parse_number, text) < 0.05
        assert cpu_seconds(extract_answer, text) < 0.05
        assert cpu_seconds(is_correct, text, Problem("?", "blue whale", "")) < 0.05
        for function in REWARD_FUNCTIONS:
            assert cpu_seconds(function, text, Problem("?", "72", "")) < 0.05, function.__name__
