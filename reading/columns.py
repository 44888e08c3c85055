"""Which column of a table is the question, which the answer, and what a row says with them.

The names that data sets usually have are taken as they are, in any case; where two could be meant,
or none could, whoever has the data says so by --question_field and its like.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass
from decimal import Decimal

from reading.choices import LETTER, choice_columns, choices_of, way_of, why_none, with_choices
from reading.images import COLUMNS
from utils import UserError, is_number

# Tiers: a name in an earlier one wins; two in one are not for us to choose from.
QUESTIONS = (("question",), ("problem",),
             ("prompt", "messages", "conversations", "instruction", "query"))  # fmt: skip
ANSWERS = (
    ("answer",),
    ("final_answer", "ground_truth", "gold", "gold_answer", "expected_answer", "correct_answer",
     "answerkey", "target", "reward_model.ground_truth"),
    ("solution", "output", "response", "completion"),
    ("messages", "conversations"),
)  # fmt: skip
WORKED = {*ANSWERS[2], *ANSWERS[3]}  # which hold a way to the answer, and mark it, if at all
# What a question is about, in a column beside it. Prompts are whole.
CONTEXTS = ("context", "passage", "article", "body", "support")
WHOLE = ("prompt", "messages", "conversations")
ROLES = {"human": "user", "gpt": "assistant", "developer": "system"}  # other names of ours
BRACES = re.compile(r"\\[\\{}]|(\\(?:boxed|fbox)\s*)?\{|\}")
BOXED = "\\boxed{}"
MARK = re.compile(r"(?<!#)####(?!#)")


@dataclass(frozen=True)
class Fields:
    """What the flags of these names say of a data set; None: what its columns are called says it.
    A name with a dot that no column has is of a field in a field."""

    question_field: str | None = None
    answer_field: str | None = None
    solution_field: str | None = None
    train_split: str = "train"
    test_split: str = "test"


@dataclass(frozen=True)
class Columns:
    """The columns that a table's questions, answers, ... are taken from, None or () where from
    none."""

    question: str
    answer: str
    solution: str | None = None
    choices: tuple = ()
    input: str | None = None  # Alpaca's, which belongs to its instruction
    contexts: tuple = ()
    left_out: tuple = ()  # (columns that are called like contexts or choices, why they are none)

    def plain(self):
        """Whether this is what rows are asked to look like."""
        ours = (self.question, self.answer, self.solution or "solution")
        besides = self.choices or self.contexts or self.left_out
        return ours == ("question", "answer", "solution") and not besides


def columns_of(rows, where, fields=Fields()):
    """The Columns of rows [(place, row)] of the table `where`. Raises UserError where they are not
    plain, naming the columns found and the flag that says it."""
    names = {name: None for _, row in rows for name in row}
    inner = {f"{name}.{inner}": None for _, row in rows for name, value in row.items()
             if isinstance(value, dict) for inner in value}  # fmt: skip
    everything = names | inner
    lower = {name.lower(): name for name in reversed(everything)} | {n: n for n in everything}
    for flag in ("question_field", "answer_field", "solution_field"):
        name = getattr(fields, flag)
        if name and all(value_at(row, name) is None for _, row in rows) and name not in everything:
            raise UserError(f"--{flag} {name}: {where} has no such column; {_listed(names)}")

    def found(tiers, kind):
        if named := getattr(fields, f"{kind}_field"):
            return named
        for tier in tiers:
            there = [lower[name] for name in tier if name in lower]
            if len(there) > 1:
                both = " and ".join(f"`{name}`" for name in there[:2])
                raise UserError(f"{where}: {both} may be the {kind}; say which by --{kind}_field")
            if there:
                return there[0]
        raise UserError(f"{where}: no column is known for the {kind}; {_listed(names)}; name it by "
                        f"--{kind}_field")  # fmt: skip

    question = found(QUESTIONS, "question")
    tiers = ANSWERS if question.lower() in ANSWERS[3] else ANSWERS[:3]
    answer = found(tiers, "answer")
    solution = fields.solution_field or lower.get("solution")
    worked = [row[solution] for _, row in rows if row.get(solution) not in (None, "")]
    if worked and not fields.solution_field and not any(isinstance(one, str) for one in worked):
        solution = None  # numbers, or several: nothing that a cold start could show
    taken = {question, answer, solution}
    choices = tuple(name for name in choice_columns(names) if name not in taken)
    if not any(row.get(name) for _, row in rows for name in choices):
        choices = ()
    beside = [lower[name] for name in CONTEXTS if name in lower and question.lower() not in WHOLE]
    contexts, left_out = [], []
    for name in beside:
        values = [row[name] for _, row in rows if row.get(name)]
        if values and name not in taken:
            if all(map(_is_text, values)):
                contexts.append(name)
            else:
                left_out.append(((name,), "which is no text"))
    if len(choices) > 1:
        answers = [_answer_of(row, Columns(question, answer), where)[0] for where, row in rows]
        if why := why_none(rows, choices, answers):
            left_out, choices = [*left_out, (choices, why)], ()
    return Columns(question, answer, None if solution == answer else solution, choices,
                   lower.get("input") if question.lower() == "instruction" else None,
                   tuple(contexts), tuple(left_out))  # fmt: skip


def _is_text(value):
    """Whether a value is a text, or several."""
    return all(isinstance(part, str) for part in (value if isinstance(value, list) else [value]))


def _listed(names):
    shown = ", ".join(f"`{name:.20}`" for name in names if "." not in name)
    return f"there are {shown:.60}" if names else "it is empty"


def value_at(row, name):
    """A column's value, or a.b's inside of column a; None where there is none."""
    if name in row:
        return row[name]
    for part in name.split("."):
        row = row.get(part) if isinstance(row, dict) else None
    return row


def parts_of(rows, columns):
    """([(question, answer, solution, extra)] of rows [(place, row)], how many answers were found by
    which mark, how many have a #### that is none): texts but for extra, which is what else a row
    holds. Raises UserError, naming place and column."""
    parts, marks, headings = [], Counter(), 0
    for where, row in rows:
        answer, solution, mark, passed = _answer_of(row, columns, where)
        worked = _text_at(row, columns.solution, where) if columns.solution else ""
        # <<48/2=24>> are calculator calls for GSM8K's own models, not part of the text.
        solution = re.sub(r"<<[^<>]*>>", "", worked or solution).strip()
        used = {columns.question, columns.answer, columns.solution, columns.input, *COLUMNS}
        extra = {name: row[name] for name in row if name not in used}
        parts.append((_question_of(row, columns, where), answer, solution, extra))
        marks[mark] += 1
        headings += passed
    if columns.choices:
        tables = [choices_of(row, columns.choices, where) for where, row in rows]
        way = way_of([answer for _, answer, _, _ in parts], tables)
        for n, ((where, _), choices) in enumerate(zip(rows, tables)):
            asked, answer, *rest = parts[n]
            asked, answer = with_choices(asked, answer, choices, way, where, columns)
            parts[n] = (_checked(asked, columns.choices[0], where), answer, *rest)
    return parts, marks, headings


def _question_of(row, columns, where):
    question = _text_at(row, columns.question, where, turn="user")
    if not question:
        raise UserError(f"{where}: `{columns.question}` is missing or empty; every row needs one")
    if columns.input and (given := _text_at(row, columns.input, where)):
        question = f"{question}\n{given}"
    for name in reversed(columns.contexts):
        texts = row.get(name) or []
        texts = texts if isinstance(texts, list) else [texts]
        about = [text for text in texts if text.strip()]
        question = _checked("\n\n".join([*about, question]), name, where)
    return question


def _answer_of(row, columns, where):
    """(the gold answer, the way to it or "", the mark that it was found by or "", whether there is
    a #### and none is a mark)."""
    text = _text_at(row, columns.answer, where, turn="assistant", numbers=True)
    if not text:
        raise UserError(f"{where}: `{columns.answer}` is missing or empty; every row needs one")
    way, mark, answer = _parted(text)
    passed = not mark and bool(MARK.search(text))
    if mark and not answer:
        raise UserError(f"{where}: nothing after #### in `{columns.answer}`; the answer belongs "
                        "there")  # fmt: skip
    answer = answer.strip().partition("\n")[0] if mark else answer
    box = last_box(answer)
    if box and not mark:
        more = re.sub(r"\\(boxed|fbox)|\W", "", text.replace(box, ""))
        way, mark = text if more or columns.answer.lower() in WORKED else "", BOXED
    if not mark and columns.answer.lower() == "solution":
        raise UserError(f"{where}: `{columns.answer}` marks no answer, by \\boxed{{}} or ####; "
                        "name the column that has it by --answer_field")  # fmt: skip
    return box or answer.strip(), way, mark, passed


def _parted(text):
    """(before, mark, after) of GSM8K's ####, ("", "", text) without one: of the last that no
    heading of Markdown is, for these begin like it."""
    marks = [*MARK.finditer(text)]
    for mark in reversed(marks):
        before, after = text[: mark.start()], text[mark.end() :].strip()
        line, _, rest = after.partition("\n")
        if _ends_in(rest, line) or (len(marks) == 1 and not _is_body(rest)):
            return before, mark[0], after
    return "", "", text


def _ends_in(rest, line):
    """Whether a #### line is the answer by itself: a number, or the last line, or what the rest
    ends in, as MetaMath's "The answer is: 10 PM"."""
    if not rest.strip() or (re.search(r"\d", line) and not re.search(r"[^\W\d]", line)):
        return True
    said = re.escape(line.strip(" .$"))
    return said and re.search(rf"(?<!\w){said}\W*\Z", rest)


def _is_body(rest):
    """Whether this is what a heading has below it: several lines, or a box with the answer."""
    return len(re.findall(r"\S.*", rest)) > 1 or last_box(rest)


def _text_at(row, name, where, turn=None, numbers=False):
    """A column's text, "" where it is missing; of messages, that of the last `turn`."""
    value = value_at(row, name)
    if isinstance(value, list) and turn and all(isinstance(part, dict) for part in value):
        value = _last(value, turn, where, name)
    if numbers and (type(value) in (int, Decimal) or _is_finite(value)):
        value = str(value)
    if not isinstance(value, str | None):
        raise UserError(f"{where}: `{name}` is {str(value)[:40]}; expected text"
                        + (" or a finite number" if numbers else ""))  # fmt: skip
    return _checked((value or "").strip(), name, where)


def _checked(text, name, where):
    if re.search("[\ud800-\udfff]", text):
        raise UserError(f"{where}: `{name}` holds half a character (\\ud800 to \\udfff); remove it")
    return text


def has_numbers(rows, name):
    """Whether a column, or a field in one, has numbers, of which the digits count."""
    return any(is_number({name: value_at(row, name)}, name) for _, row in rows)


def _is_finite(value):
    return type(value) is float and math.isfinite(value)


def _last(messages, turn, where, name):
    """What the last message of this role says, of a conversation of one turn. A system message is
    left out, for the run has its own."""
    said = {"user": [], "assistant": [], "system": []}
    for message in messages:
        role = message.get("role") or message.get("from")
        content = message.get("content", message.get("value"))
        if isinstance(content, list):  # parts, of which we know texts
            parts = [part.get("text") if isinstance(part, dict) else None for part in content]
            known = all(isinstance(part, str) for part in parts)
            content = "\n".join(parts) if known else None
        role = ROLES.get(role, role) if isinstance(role, str) else None
        if role not in said or not isinstance(content, str):
            raise UserError(f"{where}: `{name}` holds a message that is not a text {{role, "
                            f"content}} of user, assistant or system: {message!r:.40}")  # fmt: skip
        said[role].append(content)
    asked, answered = len(said["user"]), len(said["assistant"])
    alone = turn == "assistant" and (asked, answered) == (0, 1)  # a completion, as TRL has it
    if (asked != 1 or answered > 1) and not alone:
        raise UserError(f"{where}: `{name}` is a conversation of several turns, or of none; make "
                        "it one question")  # fmt: skip
    return said[turn][0] if said[turn] else ""


def last_box(text):
    r"""What the last \boxed{...} of a text holds, braces in it balanced; "" where there is none."""
    opened, found = [], (-1, "")  # where braces that are still open began, -1 for others than boxes
    for match in BRACES.finditer(text):
        if match[0].endswith("{") and not match[0].startswith("\\{"):
            opened.append(match.end() if match[1] else -1)
        elif match[0] == "}" and opened:
            start = opened.pop()
            if start > found[0]:
                found = start, text[start : match.start()].strip()
    return found[1]


def taken_from(columns, marks, headings):
    """What was taken from which column of a table, "" where that is plain. marks, headings: see
    parts_of."""
    marked, whole = [mark for mark in sorted(marks) if mark], marks[""]
    how, worked = "", columns.answer.lower() in WORKED
    if marked and (worked or whole or BOXED in marked):
        how = f", its {' or '.join(marked)}"
        how += f" ({whole} of {marks.total()} rows have none: the whole)" if whole else ""
    elif worked:
        how = ", the whole" + (not headings) * f" (no row has {BOXED} or ####)"
    if headings:
        how += f" (rows with #### as a heading alone: {headings})"
    if columns.plain() and not how:
        return ""
    pairs = [("question", (columns.question,)), ("its input", (columns.input,)),
             ("its context", columns.contexts), ("choices", columns.choices),
             ("answer", (columns.answer,)), ("solution", (columns.solution,))]  # fmt: skip
    parts = [f"{kind} from {_quoted(names)}" + how * (kind == "answer")
             for kind, names in pairs if any(names)]  # fmt: skip
    parts += [f"nothing from {_quoted(names)}, {why}" for names, why in columns.left_out]
    return ", ".join(parts)


def _quoted(names):
    return ", ".join(f"`{name}`" for name in names)


def choices_remark(columns, where, problems):
    """One line where golds are letters of choices that no problem shows, else ""."""
    blind = [p.answer for p in problems if LETTER.fullmatch(p.answer)
             and not re.search(rf"\b{p.answer.strip('()')}\s?[).:]", p.question)]  # fmt: skip
    if columns.choices or not blind:
        return ""
    return (f"{where}: {len(blind)} of {len(problems)} answers are one letter, such as "
            f"{blind[0]!r}, and no column is known for choices (`choices`, `options`, `A`, `B`, "
            "...): nobody is shown any")  # fmt: skip
