"""The choices of a row, in the forms that data sets have for them, and which of them is right."""

import ast
import json
import math
import re
from decimal import Decimal

from utils import UserError

ONE_COLUMN = ("choices", "options")
PER_CHOICE = re.compile(r"(?i:((?:option|choice)[ _]?)([a-z]|\d{1,2}))|([A-Z])")
LABELS = ("label", "key", "letter", "id")  # what rows call a choice's label, and its text
TEXTS = ("text", "value", "content")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LETTER = re.compile(r"\(?[A-Z]\)?")
WAYS = {"label": "by its label", "number": "counted from 0", "text": "by its text"}


def choice_columns(names):
    """The columns that hold choices: `choices` or `options`, or one for each of them (A, B, ...;
    option_a, ...; option_1, ...); () where there are none."""
    lower = {name.lower(): name for name in reversed(names)}
    for name in ONE_COLUMN:
        if name in lower:
            return (lower[name],)
    series = {}
    for name in names:
        if match := PER_CHOICE.fullmatch(name):
            series.setdefault((match[1] or "").lower(), {})[_label_of(name)] = name
    for of_label in series.values():
        labels = sorted(of_label, key=lambda label: (len(label), label))
        numbers = [str(number) for number in range(len(labels) + 1)]
        if len(labels) > 1 and labels in ([*LETTERS[: len(labels)]], numbers[:-1], numbers[1:]):
            return tuple(of_label[label] for label in labels)
    return ()


def _label_of(name):
    return re.search(r"\d+$|.$", name)[0].upper()


def choices_of(row, columns, where):
    """{label: text, None where a label has none} of a row, {} where the row has no choices. Raises
    UserError, naming `where`, the row's place, for what is none of the forms."""
    value = row.get(columns[0]) if len(columns) == 1 else _series(row, columns)
    try:
        return _read(value)
    except ValueError as error:
        reason = str(error) or "expected a list of texts, {label: text}, or such a list as text"
        shown = " ".join(str(value).split())
        raise UserError(f"{where}: `{columns[0]}` is {shown:.30}; {reason}; rename it if it is "
                        "something else") from None  # fmt: skip


def _series(row, columns):
    return {_label_of(name): row.get(name) for name in columns}


def _read(value):
    """The same of the value alone; raises ValueError."""
    if isinstance(value, str):
        value = _parsed(value) if value.strip() else None
    pairs = _pairs(value or [])
    labels, texts = [str(label).strip() for label, _ in pairs], [_text(text) for _, text in pairs]
    there = [text for text in texts if text is not None]
    if not there:
        return {}
    if len(texts) > len(LETTERS):
        raise ValueError(f"{len(texts)} choices are more than there are letters")
    if len(there) < 2 or len({*labels}) < len(labels) or "" in labels:
        raise ValueError
    # "A) red" says its letter itself. Initials of names are in no order.
    inside = [text and re.match(r"\(?([A-Z])[).:]\s*(?=\S)", text) for text in texts]
    if all(text is None or (match and match[1] == letter)
           for text, match, letter in zip(texts, inside, LETTERS)):  # fmt: skip
        texts = [match and text[match.end() :] for text, match in zip(texts, inside)]
        labels = LETTERS
    return dict(zip(labels, texts))


def _parsed(text):
    """The list or dict that a cell of a table holds as JSON, or as Python writes it."""
    for parse in (json.loads, ast.literal_eval):  # which runs nothing
        try:
            value = parse(text.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        if isinstance(value, list | tuple | dict):
            return value
    raise ValueError


def _pairs(value):
    """[(label, text)] of a list or dict."""
    if isinstance(value, dict):
        # A list of dicts, as ARC has it and as Arrow turns it: {text: [...], label: [...]}
        texts, labels = _named(value, TEXTS, list), _named(value, LABELS, list)
        if texts is None:
            return [*value.items()]
        if labels is not None and len(labels) != len(texts):
            raise ValueError
        return [*zip(labels or _letters(texts), texts)]
    if not isinstance(value, list | tuple):
        raise ValueError
    if all(isinstance(part, dict) for part in value):
        if not all({*TEXTS} & {*part} for part in value):
            raise ValueError
        labels = [_named(part, LABELS) for part in value]
        labels = _letters(value) if None in labels else labels
        return [*zip(labels, (_named(part, TEXTS) for part in value))]
    if all(isinstance(part, list | tuple) and len(part) == 2 for part in value):
        return [*value]  # of Arrow's maps
    return [*zip(_letters(value), value)]


def _letters(values):
    return [*LETTERS, *map(str, range(len(LETTERS), len(values)))]


def _named(part, names, kind=object):
    values = [part.get(name) for name in names]
    return next((value for value in values if value is not None and isinstance(value, kind)), None)


def _is_blank(value):
    return value is None or (type(value) is float and not math.isfinite(value))


def _text(value):
    """A choice's text, None where it is blank, as Arrow and tables fill up what a row lacks."""
    if _is_blank(value):
        return None
    if type(value) in (int, float, Decimal):
        return str(value)
    if not isinstance(value, str):
        raise ValueError
    return value.strip() or None


def why_none(rows, columns, answers):
    """Why columns that are called like a series of choices hold none, "" where they do: texts
    alone, in every row, and what each answer means. A and B are names of numbers as well."""
    for (where, row), answer in zip(rows, answers):
        values = _series(row, columns)
        if not all(isinstance(value, str) or _is_blank(value) for value in values.values()):
            return f"for {where} has there what is no text"
        try:
            choices = _read(values)
        except ValueError:
            return f"for {where} has one choice there, or more than 26"
        meant = _readings(answer, choices).values()
        if choices and all(choices[label] is None for label in meant):
            return f"for {where} has an answer that is none of them"
    return ""


# --- the right one -------------------------------------------------------------------------------


def _readings(answer, choices):
    """{how an answer can be read: the label that it then means}."""
    number = re.fullmatch(r"([0-9]{1,2})(?:\.0*)?", answer)  # pandas makes 1.0 of 1
    writings = {answer, number[1] if number else answer}
    labels = [*choices]
    found = _single({
        "label": [label for label in labels if label in writings]
        or [label for label in labels if label.casefold() == answer.casefold()],
        "text": [label for label, text in choices.items() if text in writings],
    })  # fmt: skip
    if number and int(number[1]) < len(labels):
        index = int(number[1])
        found["number"] = labels[index]  # counted from 0, as in MMLU
    return found or _loosely(answer, choices)


def _loosely(answer, choices):
    """The same of "(b)", "B.", "B. blue", or a text in another case."""
    bare = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\{(.*)\}", r"\1", answer).casefold().strip()
    label, rest = re.fullmatch(r"(?s)\(?(\w*)[).:]*\s*(.*)", bare).groups()
    folded = {name: (text or "").casefold() for name, text in choices.items()}
    return _single({
        "label": [name for name, text in folded.items()
                  if name.casefold() == label and rest in ("", text)],
        "text": [name for name, text in folded.items() if text == bare],
    })  # fmt: skip


def _single(same):
    return {way: labels[0] for way, labels in same.items() if len(labels) == 1}


def way_of(answers, tables):
    """The one way in which all answers of a table can be read: "label", "number" (the choices
    counted from 0) or "text"; None where there are several such ways, or none."""
    found = [_readings(answer, choices) for answer, choices in zip(answers, tables) if choices]
    ways = {*WAYS}.intersection(*(readings for readings in found if readings))
    return ways.pop() if len(ways) == 1 else None


def with_choices(question, answer, choices, way, where, columns):
    """(the question with a line for each choice, the right one's label). way: see way_of. Raises
    UserError where no choice is meant, or more than one could be."""
    named = f"{where}: `{columns.answer}` {' '.join(answer.split()):.30}"
    if not choices:
        counts = way == "number" and re.fullmatch(r"([01]?[0-9]|2[0-5])(\.0*)?", answer)
        if LETTER.fullmatch(answer) or counts:
            mend = "give the other rows' answers as letters" if counts else "leave it out"
            raise UserError(f"{named} names a choice, and the row has none in "
                            f"`{columns.choices[0]}`; add them, or {mend}")  # fmt: skip
        return question, answer
    found = _readings(answer, choices)
    found = {way: found[way]} if way in found else found
    if len({*found.values()}) > 1:
        may_be = " or ".join(f"{label}, {WAYS[way]}" for way, label in found.items())
        mend = "text" if "label" in found else "label"  # letters are no numbers
        raise UserError(f"{named} may be choice {may_be}; give each choice's {mend} instead")
    label = next(iter(found.values()), None)
    if choices.get(label) is None:
        there = ", ".join(label for label, text in choices.items() if text is not None)
        raise UserError(f"{named} is none of the choices {there:.40}; mend it, or rename "
                        f"`{columns.choices[0]}` if it is something else")  # fmt: skip
    lines = [f"{label}. {text}" for label, text in choices.items() if text is not None]
    return "\n".join([question, *lines]), label
