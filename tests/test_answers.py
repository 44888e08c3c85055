r"""How an answer may be written: docs/rewards.md's table, row by row, and its other side, the wrong
answers that such a reader could let through."""

import json
import random
from decimal import Decimal
from fractions import Fraction

import pytest

from evaluator import (
    LONGEST_ANSWER,
    answers_match,
    correctness,
    integer_format,
    is_correct,
    is_correct_leniently,
    measured,
    parse_number,
    unwrapped,
)
from rldatasets import Problem


def written(answer):
    return f"<reasoning>\nSo.\n</reasoning>\n<answer>\n{answer}\n</answer>\n"


# --- right in the usual writings: gold, the answers -----------------------------------------------

RIGHT = {
    # a unit in brackets, as ASDiv has it
    "7 (pens)": "7 | 7 pens | 7 (pens) | 7.0 | $7$ | 7 Pens",
    "1,080 (square feet)": "1080 | 1080 square feet | 1,080 (Square feet)",
    "-2.5 (degrees)": "-2.5 | -2.5° | -5/2",
    # the same for what is not a number
    "seven (pens)": "seven (pens) | Seven (pens).",
    # wrappers
    "72": r"\boxed{72} | **72** | $72$ | $$72$$ | `72` | \(72\) | \[72\] | $\boxed{72}$ | "
    r"**$\boxed{72}$.** | \[ \boxed{72} \] | \text{72} | \fbox{72} | \mathbf{72} | ** 72 ** | "
    "**72**. | `72`. | **72.** | $72$."
    # a unit after it, a currency before or after it
    r" | 72 clips | 72 clips. | 72 € | 72€ | 72 EUR | 72$ | 72 $ | $72 | \$72 | $\$72$ | ¥72 | "
    r"72 USD | 72 dollars | 72% | 72\% | 72 percent | 72 km/h | 72 m² | 72 m^2 | 72 m/s^2 | "
    r"72 miles per hour | 72 \text{ clips} | 72\text{ km/h} | \boxed{72\text{ cm}} | 72~km | "
    r"72\,\mathrm{kg} | 72 sq. ft. | 72 in. | 72 kilowatt-hours | 72°C | 72 °F | 72° | "
    r"72^\circ | 72^{\circ} | 72 N·m | $72/hour | 72 $/hour | 72 T-shirts | 72.0 apples/day"
    # powers of ten
    r" | 7.2e1 | 7.2E1 | 72e0 | 7.2 × 10^1 | 7.2 \times 10^{1} | $7.2 \times 10^1$ | 720e-1 | "
    r"7.2*10^1 | 7.2x10^1 | 7.2 \cdot 10^1 | 7.2×10¹ | 720 × 10⁻¹ | 720 × 10^−1",
    "1000": r"1,000 | 1{,}000 | 10^3 | $10^{3}$ | 10³ | 1e3 | 1e+3 | 2 \times 10^3 - no",
    "2000": r"2 \times 10^3 | 2 × 10³ apples | 2e3 m/s | +2,000",
    "-1000": "-10^3 | −10³ | -1e3 | -$1,000 | **-1,000**",
    "2e-06": "0.000002 | 2e-6 | 2 × 10^-6 | 0.0000020 | .000002",
    "1e+16": "10000000000000000 | 10,000,000,000,000,000 | 10^16",
    # fractions
    "3/4": r"0.75 | .75 | 3 / 4 | \frac{3}{4} | \dfrac34 | $\frac{3}{4}$ | ¾ | 3/4 cups | 3/4.",
    "0.75": r"3/4 | \frac34 | \tfrac{3}{4} | ¾ | 0.750 | 3/4 of the cake",
    "-0.5": r"-1/2 | −1/2 | -\frac{1}{2} | -½ | -5e-1",
    "2.5": r"2 1/2 | 5/2 | 2½ | 2 ½ | 2\frac{1}{2} | 2 \frac12 | \boxed{2\frac{1}{2}} | 2 1/2 h",
    "5/2": "2.5 | 2 1/2 | 2½ | 5/2",
    "-2 1/2": "-2.5 | -5/2 | −2½",
    "1/3": r"1/3 | ⅓ | \frac13 | **1/3**",
    # letters and words
    "B": r"(B) | B. | B) | b) | (b) | b | **B** | \boxed{B} | \boxed{\text{B}} | **(B)** | (B). | "
    r"\textbf{(B)} | `B` | $B$ | \text{(B)}",
    "(B)": "B | b) | B.",
    "blue whale": r"Blue whale. | **blue whale** | (blue whale) | blue  whale | \text{Blue whale}",
    "yes": "Yes. | (yes) | **Yes** | YES",
    "U.S.": "U.S. | u.s.",
    # what follows the number, on both sides
    "9 AM": "9 am | 9 a.m. | 9AM | 9 A.M. | 9.0 am | **9 AM**",
    "5 km": r"5 km | 5km | 5.0 km | 5 km. | 5\text{ km} | $5 \, \mathrm{km}$",
    "50%": r"50 % | 50% | 50 percent | 50\% | 50.0%",
    "$5": r"5 dollars | 5$ | 5 USD | \$5.00 | $5 dollars | 5 $",
    "5 €": "€5 | 5 EUR | 5 euros | 5,00 € - no",
    "60 km/h": "60 km / h | 60 km per h | 60.0 km/h",
    "9 m^2": "9 m² | 9m^2",
    "12:30": "12:30 | **12:30** | 12:30.",
    "3:2": "3:2 | $3:2$",
    "6/8": "6/8 | **6/8**",
    "1/2004!": "1/2004!",
}
# --- wrong, whatever the reader drops: gold, the answers ------------------------------------------

WRONG = {
    "7 (pens)": "8 | 7 dogs | 7 (dogs) | 7 (pens) (dogs) | 7 pens or 8 | 77 | -7 | $7",
    "7": "7 (8) | 8 (7)",
    "seven (pens)": "seven | 7",
    "9 AM": "9 PM | 9 | 9 p.m. | 9 A | 10 AM | 9 am pm",
    "2 A": "2 B | 2 | 2 a | 2A B",
    "5 km": "5 mm | 5 m | 5 | 5 km/h | 5 kg | 5 km^2 | 5 miles",
    "5 mW": "5 MW | 5 mw",
    "100 F": "100 C | 100 f | 100 | 100 °F",
    "7 north": "7 south | 7",
    "2x": "2 | 2y | 2X | 2 x y",
    "-3y": "-3 | 3y | -3x",
    "5i": "5 | 5j | -5i",
    "50 %": "50 | 0.5 | 1/2 | 50 € | 50 ° | 5 %",
    "50%": r"50 | 0.5 | 50 percentage | \frac12",
    "50": "0.5 | 1/2 | 500%",
    "0.5": "50% | 50 | 5",
    "$5": "5 | 5 € | €5 | £5 | 5 km | 5%",
    "5 €": "5 | $5 | 5 $",
    "20 °C": "20 °F | 20 | 20 K",
    "60 km/h": "60 km | 60 m/s | 60 | 60 mph",
    "9 m^2": "9 m | 9 m^3 | 9 | 9 cm^2",
    "3:2": "3:1 | 3 | 2 | 1.5 | 3/2",
    "12:45": "12:30 | 12 | 45 | 12.45",
    "1/2004": "1/2006 | 0.0005 | 1 | 2004",
    "1/2004!": "1/2006! | 0 | 1/2004",
    "5!": "5 | 120",
    "3/4": "4/3 | 3 | 4 | 6/8 | -3/4 | 0.7 | 34 | 3/4/5 | 3/4 million",
    "6/8": "3/4 | 0.75 | 8/6",  # a date, a score: June 8 is not March 4
    "1/3": "0.33 | 0.3333333333333333333333333333 | 3",
    "2.5": "2 1/5 | 21/2 | 2 5/2 | 25 | 2 3/6",
    "2": "2/three | 2/x | 4/2 | 2/1 | 1/2 | 2^2 | 2² | 2 thirds | 2 1/2 | 2½ | 2e1 | 2 below zero",
    "3": "3 out of four | 3 to one | 3 km/h or four | 3M | 3B | 3 bn | 3 lakh | 3or four",
    "1000": "10^2 | 10 | 10^-3 | 1e4 | 10^3 or 10^4 | 1.000 | 10^33",
    "72": r"\boxed{73} | \boxed{72} or \boxed{73} | \boxed{72}\boxed{73} | **72** or **73** | "
    "$72$ or $73$ | `72` `73` | **72** 73 | (72) | [72] | {72} | 72! | 72, 73 | $72 €",
    "B": "(C) | C. | A) and B) | (A) (B) | B or C | A, B | (B | B C | not B | b2 | (B) (B)",
    "blue": "red. | (red) | blue red | not blue",
    "yes": "no. | yes and no | (no)",
    "-" + "1" * 40: "-" + "1" * 39 + "2",  # more digits than Decimal's own arithmetic keeps
    "[1, 2]": "(1, 2) | {1, 2} | 1, 2",
}


def rows(table):
    for gold, answers in table.items():
        yield from (
            (gold, answer) for answer in answers.split(" | ") if not answer.endswith("- no")
        )


@pytest.mark.parametrize(("gold", "answer"), rows(RIGHT))
def test_a_right_answer_in_a_usual_writing_is_right(gold, answer):
    assert correctness(written(answer), Problem("?", gold, "")) == 2.0
    assert is_correct_leniently(written(answer), Problem("?", gold, ""))


@pytest.mark.parametrize(("gold", "answer"), rows(WRONG))
def test_what_follows_or_surrounds_a_number_makes_no_wrong_answer_right(gold, answer):
    assert not is_correct(written(answer), Problem("?", gold, ""))


def test_every_gold_answer_of_both_tables_matches_itself_however_it_is_wrapped():
    for gold in {**RIGHT, **WRONG}:
        for form in ("{}", "**{}**", r"\boxed{{{}}}", "`{}`", " {} "):
            assert answers_match(form.format(gold), gold), (form, gold)


@pytest.mark.parametrize("unit", ["am", "N", "kg", "%", "€", "apples", "m^2", "km/h", "°C", "of 9"])
def test_golds_of_one_number_and_two_units_never_match(unit):
    others = ["pm", "J", "g", "", "$", "pears", "m", "km", "°F", "of 8"]
    for other in others:
        for gold, answer in ((unit, other), (other, unit)):
            matches = answers_match(f"7 {answer}", f"7 {gold}")
            assert matches is (gold == "" and answer != "of 9"), (gold, answer)


def test_values_are_exact():
    assert measured("1/3") == (Fraction(1, 3), "")
    assert measured("-2 1/2 cups") == (Fraction(-5, 2), "cups")
    assert measured("2.50 €") == (Decimal("2.50"), "€")
    assert parse_number("-" + "1" * 40) == Decimal("-" + "1" * 40)
    assert parse_number("1.000000000000000000000000000000000001") > 1
    assert parse_number("1/3") is None and measured("a third") == (None, "")
    assert parse_number("9e99") == 9 * 10**99 and parse_number("9e100") is None


def test_wrappers_end_somewhere():
    assert unwrapped(r"**\(`$\[5.\].$`\)**.") == "5"
    deep = r"\boxed{" * 20 + "5" + "}" * 20
    assert unwrapped(deep) == "5" and len(deep) <= LONGEST_ANSWER
    for several in (r"\boxed{5} or \boxed{6}", "**5** or **6**", "$5$ or $6$", "`5` or `6`"):
        assert unwrapped(several) == several
    longer = r"\boxed{" * 40 + "5" + "}" * 40
    assert unwrapped(longer) == longer


def test_any_text_is_read_without_an_error_and_matches_itself():
    rng = random.Random(0)
    pieces = [*"0123456789.,/^%$€£°·×-−+()[]{}*`\\ \n", "\\boxed{", "\\frac", "10^", "km",
              "B", "e5", "½", "⅞", "²", "⁻", "\\text{", "}", "or", "\ud800", "\x00"]  # fmt: skip
    for _ in range(20_000):
        answer, gold = ("".join(rng.choices(pieces, k=rng.randint(1, 9))) for _ in range(2))
        value, unit = measured(answer)
        assert (value is None and unit == "") or isinstance(value, Decimal | Fraction)
        assert answers_match(answer, answer), answer
        if answers_match(answer, gold) and measured(gold)[1]:
            assert answers_match(gold, answer), (answer, gold)


def test_the_gold_answers_of_gsm8k_match_themselves_in_every_wrapper_and_no_neighbour(gsm8k):
    golds = []
    for split in ("train", "test"):
        with open(gsm8k / f"{split}.jsonl") as file:
            golds += [json.loads(line)["answer"].rpartition("####")[2].strip() for line in file]
    assert len(golds) == 8792
    forms = ("{}", r"\boxed{{{}}}", "**{}**", "${}$", "`{}`", "{}.", "{} €", "{} km/h", "${}")
    for i, gold in enumerate(golds):
        number = parse_number(gold)
        assert number == int(gold.replace(",", "")) and answers_match(gold, gold)
        form = forms[i % len(forms)]
        assert answers_match(form.format(gold), gold), (form, gold)
        assert not answers_match(form.format(number + 1), gold)


# --- integer_format ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gold", "answer", "paid"),
    [
        ("72", "72", True), ("72", "73", True), ("1,080", "5", True), ("-3", "−4", True),
        ("72", "72.0", False), ("72", "72 clips", False), ("72", r"\boxed{72}", False),
        ("B", "7", False), ("Paris", "7", False), ("3/4", "7", False), ("0.75", "7", False),
        ("72.0", "72", False), ("$72", "72", False), ("72 km", "72", False), ("9 AM", "9", False),
        ("1e3", "1000", False), ("½", "2", False), ("3:2", "3", False), ("", "3", False),
        ("seventy", "70", False), ("2x", "2", False), ("(1, 2)", "1", False),
    ],
)  # fmt: skip
def test_integers_are_paid_where_the_gold_answer_is_one(gold, answer, paid):
    assert integer_format(written(answer), Problem("?", gold, "")) == 0.5 * paid
