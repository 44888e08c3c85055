"""The reward functions: edit them here. And how an answer is read.

To add a reward, write a function `name(completion, problem) -> float` and put it in
REWARD_FUNCTIONS. Its name is its key in the metrics, the logs and the plots; nothing else changes.
(Rewards in a file of their own: --evaluator FILE.py; with a dataset of their own: see tasks/.)

    python main.py lint    what do these rewards reward?
"""

import re
from decimal import Decimal

TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")

# --- reading an answer -------------------------------------------------------------------------

# Words that make another number of the one before them ("5 thousand", "2 thirds"), and those for a
# second number, which follow a word that joins them ("7 or eight", "3 hours and a half").
FRACTIONS = "half|halves|thirds?|(?:four|fif|six|seven|eigh|nin|ten|hundred|thousand)ths?"
CHANGES = f"k|(?:dozen|hundred|thousand|million|billion|trillion)s?|squared|cubed|{FRACTIONS}"
JOINS = "and|or|plus|minus|less|times|by|over|point"
SECOND = (
    "one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|hundred|thousand|quarter|"
    f"(?:twen|thir|four|for|fif|six|seven|eigh|nine)(?:teen|ty)|{FRACTIONS}"
)

# One number at the start, with at most a unit after it: "72", "-1,080", "$5.00", "50%", "8 clips."
NUMBER = re.compile(
    r"(?P<sign>[-\u2212+]?[$€£]?|[$€£][-\u2212])(?=\.?[0-9])"
    r"(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?P<fraction>\.[0-9]+)?"
    rf"(?!\s*(?:{CHANGES})\b|[a-z\s]*\b(?:{JOINS})\s+(?:a\s+)?(?:{SECOND})\b)\.?\s*%?[a-z\s]*\.?",
    re.IGNORECASE | re.ASCII,
)
INTEGER = re.compile(r"[-\u2212+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)")
# A number anywhere in a text; a minus after a digit or a word is a minus between two numbers.
WRITTEN_NUMBER = re.compile(
    r"(?:(?<![\w)])[-\u2212])?[$€£]?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)",
    re.ASCII,
)
LONGEST_NUMBER = 64  # characters; anything longer is not an answer to a grade-school problem


def parse_number(text):
    """The one number that `text` states, as an exact Decimal, or None.

    Currency sign, thousands commas, trailing ".0", percent sign, unit words after the number and
    the typographic minus are understood; two numbers, a fraction or words before it are not, nor
    are words after it that change it ("5 thousand", "3 and a half").
    """
    text = text.strip()
    if len(text) > LONGEST_NUMBER:
        return None
    match = NUMBER.fullmatch(text)
    if not match:
        return None
    value = Decimal((match["whole"] or "0").replace(",", "") + (match["fraction"] or ""))
    return -value if {"-", "\u2212"} & set(match["sign"]) else value


def extract_answer(completion):
    """The text between the answer tags, stripped; None unless both tags occur exactly once.

    Two answers are no answer, so hedging earns nothing. Text after the closing tag is ignored here
    (`tag_count` charges for it).
    """
    if completion.count("<answer>") != 1 or completion.count("</answer>") != 1:
        return None
    before, _, rest = completion.partition("<answer>")
    if "</answer>" in before:
        return None
    return rest.partition("</answer>")[0].strip()


def last_number(completion):
    """The last number in the text as it is written there, tags or none; None without a number."""
    numbers = WRITTEN_NUMBER.findall(completion)
    return numbers[-1] if numbers else None


def answers_match(answer, gold):
    """Whether two answers are equal: as numbers, or where the gold answer is not a number, as text,
    letter case and runs of white space aside. No answer, None, matches nothing."""
    if answer is None:
        return False
    number = parse_number(gold)
    if number is not None:
        return parse_number(answer) == number
    return answer.lower().split() == gold.lower().split()


def is_correct(completion, problem):
    """Whether the answer in the tags equals the gold answer."""
    return answers_match(extract_answer(completion), problem.answer)


def is_correct_leniently(completion, problem):
    """Whether the answer in the tags or the last number in the text equals the gold answer."""
    last = last_number(completion)
    return is_correct(completion, problem) or answers_match(last, problem.answer)


def has_format(completion):
    """Whether one pair of reasoning tags is followed by one pair of answer tags."""
    places = [completion.find(tag) for tag in TAGS]
    once = all(completion.count(tag) == 1 for tag in TAGS)
    return once and places == sorted(places)


# --- reward functions: edit here ---------------------------------------------------------------


def correctness(completion, problem):
    """2.0 for the right answer, else 0."""
    return 2.0 if is_correct(completion, problem) else 0.0


def integer_format(completion, problem):
    """0.5 where the answer is an integer, sign and thousands commas allowed, else 0."""
    return 0.5 if INTEGER.fullmatch(extract_answer(completion) or "") else 0.0


def strict_format(completion, problem):
    """0.5 where the completion is the four tags, each alone on its line, with text between, and
    nothing else, else 0."""
    once = all(completion.count(tag) == 1 for tag in TAGS)
    text = completion.removesuffix("\n")
    if not (once and text.startswith("<reasoning>\n") and text.endswith("\n</answer>")):
        return 0.0
    inside = text.removeprefix("<reasoning>\n").removesuffix("\n</answer>")
    reasoning, tags, answer = inside.partition("\n</reasoning>\n<answer>\n")
    return 0.5 if tags and reasoning.strip() and answer.strip() else 0.0


def soft_format(completion, problem):
    """0.5 where one pair of reasoning tags is followed by one pair of answer tags, else 0."""
    return 0.5 if has_format(completion) else 0.0


def tag_count(completion, problem):
    """0.125 for each of the four tags that occurs exactly once and alone on its line, less 0.001
    for each character after the closing answer tag; never below 0."""
    framed = f"\n{completion}\n"
    in_place = sum(completion.count(tag) == 1 and f"\n{tag}\n" in framed for tag in TAGS)
    _, closing, after = completion.rpartition("</answer>")
    excess = len(after.strip()) if closing else 0
    return max(0.0, 0.125 * in_place - 0.001 * excess)


REWARD_FUNCTIONS = [correctness, integer_format, strict_format, soft_format, tag_count]
