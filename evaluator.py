"""The reward functions: edit them here. And how an answer is read.

To add a reward, write a function `name(completion, problem) -> float` and put it in
REWARD_FUNCTIONS. Its name is its key in the metrics, the logs and the plots; nothing else changes.
One that compares the completions of a question is marked @of_group, such as `shortest_right`.
(Rewards in a file of their own: --evaluator FILE.py; with a dataset of their own: see tasks/.)

    python main.py lint    what do these rewards reward?
"""

import re
from decimal import Decimal
from fractions import Fraction
from math import gcd

TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")

# --- reading an answer -------------------------------------------------------------------------

LONGEST_ANSWER = 200  # characters; a longer text is compared as it stands
LONGEST_NUMBER = 64  # characters; anything longer is not an answer to a grade-school problem

# What people put around an answer, and LaTeX's ways to write what is in a number.
BOX = re.compile(r"\\(?:boxed|fbox|text(?:bf|rm|it)?|math(?:bf|rm|it))\s*\{(.*)\}", re.DOTALL)
FENCES = (("**", "**"), ("$$", "$$"), ("$", "$"), ("`", "`"), (r"\(", r"\)"), (r"\[", r"\]"))
IN_BRACKETS = re.compile(r"\(([^\W\d_]+(?:\s+[^\W\d_]+)*)\)|([a-z])\)", re.IGNORECASE)
LATEX = (
    (re.compile(r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}"), r"\1"), (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\([%$])"), r"\1"), (re.compile(r"\\[,;: ]|(?<=[0-9])~"), " "),
    (re.compile(r"\\!"), ""),
    (re.compile(r"\^\s*(?:\\circ|\{\\circ\})"), "°"), (re.compile(r"\\times|\\cdot|\*"), "×"),
    (re.compile(r"(?<=[0-9])\s*(?=\\[dt]?frac|[¼-¾⅐-⅞])"), " "),
    (re.compile(r"\\[dt]?frac\s*(?:\{([0-9]+)\}|([0-9]))\s*(?:\{([0-9]+)\}|([0-9]))"),
     r"\1\2/\3\4"),
    # 2 × 10^3 and 10^3 become 2e3 and 1e3.
    (re.compile(r"\s*[×x]\s*10\^\{?([-\u2212+]?[0-9]+)\}?"), r"e\1"),
    (re.compile(r"^([-\u2212+]?)10\^\{?([-\u2212+]?[0-9]+)\}?"), r"\g<1>1e\2"),
)  # fmt: skip
RAISED = re.compile("[⁻⁺]?[⁰¹²³⁴-⁹]+")
LOWERED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
FRACTION_SIGNS = str.maketrans({
    "½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5",
    "⅘": "4/5", "⅙": "1/6", "⅚": "5/6", "⅐": "1/7", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8",
    "⅑": "1/9", "⅒": "1/10",
})  # fmt: skip

# Words that make another number of the one before them ("5 thousand", "2 thirds"), those that are a
# second number wherever they stand ("7 maybe eight"; not "3 two-way tickets"), and those that are
# one after a word that joins them ("3 hours and a half").
FRACTIONS = (
    "half|halves|thirds?|(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|hundred|thousand|"
    "(?:thir|four|fif|six|seven|eigh|nine)teen|(?:twen|thir|for|fif|six|seven|eigh|nine)tie)ths?"
)
CHANGES = (
    "k|kk|mn|mln|mio|bn|mrd|"
    "(?:dozen|hundred|thousand|million|billion|trillion|quadrillion|lakh|crore)s?|"
    f"squared|cubed|{FRACTIONS}|one-half"
)
JOINS = "and|or|plus|minus|less|times|by|over|point|to|of|below"
CARDINALS = (
    "two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|"
    "(?:twen|thir|four|for|fif|six|seven|eigh|nine)(?:teen|ty)"
)
SECOND = f"zero|one|{CARDINALS}|dozen|hundred|thousand|quarter|{FRACTIONS}"

# What may follow a number: nothing that changes it, and at most a unit ("km/h", "m^2", "%", "€").
UNIT = (
    rf"(?!\s*(?:{CHANGES})\b|(?-i:[MBT])\b(?!-)|[^0-9]*(?<![a-z])"
    rf"(?:(?:{JOINS})[\s-]+(?:a[\s-]+)?(?:{SECOND})\b|(?:{CARDINALS})\b(?!-[a-z])))\.?\s*"
    rf"(?P<unit>(?:[%€$£¥₹°]|(?=[a-z])|/(?=[a-z]{{3}})(?!(?:{SECOND}|{CHANGES})\b))"
    r"(?:[a-z\s/·]|(?<=[a-z])(?:-(?=[a-z])|\.|\^-?[1-3](?![0-9])))*"
    r")?\.?"
)
CURRENCY = "[$€£¥₹]"
SIGN = rf"(?P<sign>[-\u2212+]?{CURRENCY}?|{CURRENCY}[-\u2212])"
# One number at the start, with at most a unit after it: "72", "-1,080", "$5.00", "50%", "8 clips."
NUMBER = re.compile(
    rf"{SIGN}(?=\.?[0-9])(?P<whole>[0-9]{{1,3}}(?:,[0-9]{{3}})+|[0-9]*)(?P<fraction>\.[0-9]+)?"
    rf"(?:e(?P<exponent>[-\u2212+]?[0-9]{{1,2}})(?![0-9]))?{UNIT}",
    re.IGNORECASE | re.ASCII,
)
# "3/4", "2 1/2".
RATIO = re.compile(
    rf"{SIGN}(?:(?P<whole>[0-9]{{1,9}})\s+)?(?P<over>[0-9]{{1,9}})\s*/\s*(?P<under>[0-9]{{1,9}})"
    rf"(?![0-9]){UNIT}",
    re.IGNORECASE | re.ASCII,
)
NOTED = re.compile(r"([^()]*[0-9])\s*\(([a-z][a-z /-]*)\)", re.IGNORECASE)  # "7 (pens)"
INTEGER = re.compile(r"[-\u2212+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)")
# A number anywhere in a text; a minus after a digit or a word is a minus between two numbers.
WRITTEN_NUMBER = re.compile(
    r"(?:(?<![\w)])[-\u2212])?[$€£]?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)",
    re.ASCII,
)
ONE_UNIT = {
    name: sign
    for sign, names in {"$": "dollar dollars usd", "€": "euro euros eur", "£": "gbp",
                        "%": "percent", "°": "degree degrees", "/": "per", "am": "am",
                        "pm": "pm"}.items()
    for name in names.split()
}  # fmt: skip


def unwrapped(text):
    r"""An answer without what is usually put around it: \boxed{72}, **72**, $72$, `72`, "Yes.",
    "(B)", "b)". Nothing else changes, and nothing at all in a text of more than LONGEST_ANSWER."""
    text = text.strip()
    while 0 < len(text) <= LONGEST_ANSWER:
        inside = _inside(text)
        if inside is None:
            break
        text = inside.strip()
    return text


def _inside(text):
    """What stands in one pair of wrappers around the whole text; None without one."""
    if match := BOX.fullmatch(text):
        depths = [0]
        for character in match[1]:
            depths.append(depths[-1] + (character == "{") - (character == "}"))
        return match[1] if min(depths) >= 0 else None  # else "\boxed{5} or \boxed{6}"
    for left, right in FENCES:
        inside = text[len(left) : -len(right)]
        if text.startswith(left) and text.endswith(right) and inside.strip("*$` "):
            within = inside.replace(r"\$", "")
            return inside if left not in within and right not in within else None
    if match := IN_BRACKETS.fullmatch(text):
        return match[1] or match[2]
    if text.endswith(".") and text[-2:-1] not in ("", "."):
        return text[:-1]
    return None


def parse_number(text):
    """The one number that `text` states, as an exact Decimal, or None.

    Currency sign, thousands commas, trailing ".0", percent sign, unit words after the number, the
    typographic minus and powers of ten ("1e3", "2 × 10^3") are understood, and what `unwrapped`
    takes away; two numbers, a fraction or words before it are not, nor are words after it that
    change it ("5 thousand", "3 and a half").
    """
    value, _ = measured(text)
    return value if isinstance(value, Decimal) else None


def measured(text):
    """(value, unit) of a text that states one number: an exact Decimal, or a Fraction where it is
    written as one ("3/4", "2 1/2"), and its unit, "" without one; else (None, "").

    A fraction that is not in lowest terms ("6/8", "8/4") is a date, a score or a division that
    is still to be done, and no number.
    """
    text = unwrapped(text)
    if len(text) > LONGEST_ANSWER:
        return None, ""
    text = RAISED.sub(_lowered, text)
    for pattern, plain in LATEX:
        text = pattern.sub(plain, text)
    text = text.translate(FRACTION_SIGNS).strip()
    if len(text) > LONGEST_NUMBER:
        return None, ""
    if match := NUMBER.fullmatch(text):
        exponent = (match["exponent"] or "0").replace("\u2212", "-")
        digits = (match["whole"] or "0").replace(",", "") + (match["fraction"] or "")
        value = Decimal(f"{digits}e{exponent}") if match["exponent"] else Decimal(digits)
    elif (match := RATIO.fullmatch(text)) and int(match["under"]) > 1:
        over, under = int(match["over"]), int(match["under"])
        if gcd(over, under) > 1 or (match["whole"] and over > under):
            return None, ""
        value = int(match["whole"] or 0) + Fraction(over, under)
    else:
        return None, ""
    unit = _unit(match)
    if unit is None:
        return None, ""
    negative = {"-", "\u2212"} & set(match["sign"])
    if negative:  # -value would round a Decimal to 28 digits
        value = value.copy_negate() if isinstance(value, Decimal) else -value
    return value, unit


def _lowered(match):
    """Raised digits as "^2"."""
    return "^" + match[0].translate(LOWERED)


def _unit(match):
    """One way to write a unit: "$" for "dollars", "pm" for "P.M."; None for two currencies.

    The case of short words counts: mW is not MW, nor F f.
    """
    before, after = match["sign"].strip("-\u2212+"), match["unit"] or ""
    parts = re.findall(r"[a-z-]+(?:\^-?[1-3])?|[^a-z\s]", after.replace(".", ""), re.IGNORECASE)
    parts = [ONE_UNIT.get(part.lower(), part if len(part) <= 3 else part.lower()) for part in parts]
    if before and parts[:1] == [before]:
        parts = parts[1:]
    if before and set(parts) & set("$€£¥₹"):
        return None
    return " ".join([before, *parts] if before else parts)


def after_thoughts(completion, thinking=False):
    """What follows a model's thoughts, the last </think> and blanks; all of a completion without,
    and "" where they do not end. `thinking`: whether it began in the midst of them."""
    _, closed, answer = completion.rpartition("</think>")
    if closed:
        return answer.lstrip()
    return "" if thinking or completion.lstrip().startswith("<think>") else completion


def extract_answer(completion):
    """The text between the answer tags, stripped; None unless both tags occur exactly once.

    Two answers are no answer, so hedging earns nothing. Text after the closing tag is ignored here
    (`tag_count` charges for it).
    """
    completion = after_thoughts(completion)
    if completion.count("<answer>") != 1 or completion.count("</answer>") != 1:
        return None
    before, _, rest = completion.partition("<answer>")
    if "</answer>" in before:
        return None
    return rest.partition("</answer>")[0].strip()


def last_number(completion):
    """The last number in the text as it is written there, tags or none; None without a number."""
    numbers = WRITTEN_NUMBER.findall(after_thoughts(completion))
    return numbers[-1] if numbers else None


def answers_match(answer, gold):
    """Whether two answers are equal: as numbers, or where the gold answer is not a number, as text,
    letter case, runs of white space and what `unwrapped` takes away aside. None matches nothing.

    What follows a number is dropped only where the gold answer is a bare one; else it is compared:
    "72 clips" is 72, while "9 AM" is neither "9 PM" nor 9. A unit that the gold answer has in
    brackets, "7 (pens)", may be left out, and must not be another one.
    """
    if answer is None:
        return False
    gold, noted = without_brackets(gold)
    number, unit = measured(gold)
    if number is None:
        return as_words(answer) == as_words(gold)
    value, written_unit = measured(without_brackets(answer)[0] if noted else answer)
    return value == number and (unit in ("", written_unit) or (noted and not written_unit))


def without_brackets(text):
    """("7 pens", True) for "7 (pens)", the text and False for any other."""
    match = NOTED.fullmatch(unwrapped(text)) if len(text) <= LONGEST_ANSWER else None
    return (f"{match[1]} {match[2]}", True) if match else (text, False)


def as_words(text):
    return unwrapped(text).lower().split()


def is_correct(completion, problem):
    """Whether the answer in the tags equals the gold answer."""
    return answers_match(extract_answer(completion), problem.answer)


def is_correct_leniently(completion, problem):
    """Whether the answer in the tags or the last number in the text equals the gold answer."""
    last = last_number(completion)
    return is_correct(completion, problem) or answers_match(last, problem.answer)


def has_format(completion):
    """Whether one pair of reasoning tags is followed by one pair of answer tags."""
    completion = after_thoughts(completion)
    places = [completion.find(tag) for tag in TAGS]
    once = all(completion.count(tag) == 1 for tag in TAGS)
    return once and places == sorted(places)


# --- reward functions: edit here ---------------------------------------------------------------


def correctness(completion, problem):
    """2.0 for the right answer, else 0."""
    return 2.0 if is_correct(completion, problem) else 0.0


def integer_format(completion, problem):
    """0.5 where the gold answer is an integer and the answer is one, sign and thousands commas
    allowed, else 0."""
    answers = (problem.answer.strip(), extract_answer(completion) or "")
    return 0.5 if all(map(INTEGER.fullmatch, answers)) else 0.0


def strict_format(completion, problem):
    """0.5 where the completion is the four tags, each alone on its line, with text between, and
    nothing else, else 0."""
    completion = after_thoughts(completion)
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
    completion = after_thoughts(completion)
    framed = f"\n{completion}\n"
    in_place = sum(completion.count(tag) == 1 and f"\n{tag}\n" in framed for tag in TAGS)
    _, closing, after = completion.rpartition("</answer>")
    excess = len(after.strip()) if closing else 0
    return max(0.0, 0.125 * in_place - 0.001 * excess)


# --- rewards that compare: they see all completions of a question ------------------------------


def of_group(function):
    """Marks a reward (completions, problem), which gets all G completions of a question and returns
    a number for each, in their order. It stands in REWARD_FUNCTIONS like any other. One that takes
    a third, `referee`, may ask it: see evaluation/referee.py, and --referee."""
    function.sees_group = True
    return function


def sees_group(function):
    return getattr(function, "sees_group", False)


@of_group
def shortest_right(completions, problem):
    """0.5 for the shortest of the group's right answers, in characters, falling to 0 for the
    longest; 0 for wrong ones, and where the right ones are equally long: it never pays for being
    short alone."""
    lengths = {text: len(text) for text in completions if is_correct(text, problem)}
    shortest, longest = min(lengths.values(), default=0), max(lengths.values(), default=0)
    room = max(1, longest - shortest)
    return [0.5 * (longest - lengths.get(text, longest)) / room for text in completions]


@of_group
def tournament(completions, problem, referee):
    """The mean chance that the referee prefers a completion to another of its group."""
    return referee.win_rates(problem, completions)


@of_group
def pivot(completions, problem, referee):
    """The chance that the referee prefers a completion to one of its group, for all the same."""
    return referee.win_rates(problem, completions, pivot=True)


@of_group
def rubric(completions, problem, referee):
    """The mean chance to meet the task's criteria better than another of the group does, by their
    weights; the referee is asked about each completion alone."""
    rates = {
        criterion: referee.win_rates(problem, completions, criterion, alone=True)
        for _, criterion in referee.rubric
    }
    whole = sum(weight for weight, _ in referee.rubric)
    return [
        sum(weight * rates[criterion][g] for weight, criterion in referee.rubric) / whole
        for g in range(len(completions))
    ]


REWARD_FUNCTIONS = [correctness, integer_format, strict_format, soft_format, tag_count]
