"""Which column of a table is the question, which the answer, and what a row says with them.

The names that data sets usually have are taken as they are, in any case; where two could be meant,
or none could, whoever has the data says so by --question_field and its like.
"""

import math
import re
from dataclasses import dataclass
from decimal import Decimal

from reading.images import COLUMNS
from utils import UserError

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
CHOICES = ("choices", "options")
ROLES = {"human": "user", "gpt": "assistant"}  # of ShareGPT's conversations, by ours
BRACES = re.compile(r"\\[\\{}]|(\\(?:boxed|fbox)\s*)?\{|\}")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


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
    """The columns that a table's questions, answers, ... are taken from, None where from none."""

    question: str
    answer: str
    solution: str | None = None
    choices: str | None = None
    context: str | None = None  # Alpaca's `input`, which belongs to its instruction

    def plain(self):
        """Whether this is what rows are asked to look like."""
        ours = (self.question, self.answer, self.solution or "solution", self.choices)
        return ours == ("question", "answer", "solution", None)


def columns_of(rows, where, fields=Fields()):
    """The Columns of rows [(place, row)] of the table `where`. Raises UserError where they are not
    plain, naming the columns found and the flag that says it."""
    names = {name: None for _, row in rows for name in row}
    for _, row in rows[:1]:
        names.update({f"{name}.{inner}": None for name, value in row.items()
                      if isinstance(value, dict) for inner in value})  # fmt: skip
    lower = {name.lower(): name for name in reversed(names)} | {name: name for name in names}
    for flag in ("question_field", "answer_field", "solution_field"):
        name = getattr(fields, flag)
        if name is not None and name not in names:
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
    choices = next((lower[name] for name in CHOICES if name in lower), None)
    holds_choices = choices and any(_choices(row.get(choices)) for _, row in rows)
    context = lower.get("input") if question.lower() == "instruction" else None
    return Columns(question, answer, None if solution == answer else solution,
                   choices if holds_choices else None, context)  # fmt: skip


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


def parts_of(row, where, columns):
    """(question, answer, solution, extra) of a row, texts but for extra, which is what else it
    holds. Raises UserError, naming `where`, the row's place, and the column."""
    question = _text_at(row, columns.question, where, turn="user")
    whole = _text_at(row, columns.answer, where, turn="assistant", numbers=True)
    for name, value in ((columns.question, question), (columns.answer, whole)):
        if not value:
            raise UserError(f"{where}: `{name}` is missing or empty; every row needs one")
    if columns.context and (context := _text_at(row, columns.context, where)):
        question = f"{question}\n{context}"
    solution, mark, answer = whole.rpartition("####")
    answer = answer.strip().partition("\n")[0] if mark else answer
    if mark and not answer:
        raise UserError(f"{where}: nothing after #### in `{columns.answer}`; the answer belongs "
                        "there")  # fmt: skip
    if not mark and columns.answer.lower() in WORKED:
        answer, solution = last_box(whole) or whole, whole
        if answer == whole and columns.answer.lower() == "solution":
            raise UserError(f"{where}: `{columns.answer}` marks no answer, by \\boxed{{}} or ####; "
                            "name the column that has it by --answer_field")  # fmt: skip
        solution = "" if answer == whole else solution
    if columns.choices:
        question, answer = with_choices(question, answer.strip(), row, where, columns)
    worked = _text_at(row, columns.solution, where) if columns.solution else ""
    # <<48/2=24>> are calculator calls for GSM8K's own models, not part of the text.
    solution = re.sub(r"<<[^<>]*>>", "", worked or solution)
    used = {columns.question, columns.answer, columns.solution, columns.context, *COLUMNS}
    extra = {name: row[name] for name in row if name not in used}
    return question, answer.strip(), solution.strip(), extra


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
    text = (value or "").strip()
    if re.search("[\ud800-\udfff]", text):
        raise UserError(f"{where}: `{name}` holds half a character (\\ud800 to \\udfff); remove it")
    return text


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
        role = ROLES.get(role, role)
        if role not in said or not isinstance(content, str):
            raise UserError(f"{where}: `{name}` holds a message that is not a text {{role, "
                            f"content}} of user, assistant or system: {message!r:.40}")  # fmt: skip
        said[role].append(content)
    if len(said["user"]) != 1 or len(said["assistant"]) > 1:
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


# --- multiple choice -----------------------------------------------------------------------------


def _choices(value):
    """{label: text} of a row's choices: a list of texts, ARC's {text: [...], label: [...]}, or
    {"A": text, ...}; {} where it is none of these."""
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        labels, texts = value.get("label") or LETTERS, value["text"]
    elif isinstance(value, dict):
        labels, texts = [*value], [*value.values()]
    else:
        labels, texts = LETTERS, value if isinstance(value, list) else []
    texts = [str(text) if type(text) in (int, float) else text for text in texts]
    if not texts or not all(isinstance(text, str) for text in texts) or len(labels) < len(texts):
        return {}
    # "A) red" says its letter itself
    inside = [re.match(r"\(?([A-Z])[).:]\s*(?=\S)", text) for text in texts]
    if all(inside):
        return {match[1]: text[match.end():] for match, text in zip(inside, texts)}  # fmt: skip
    return dict(zip(map(str, labels), texts))


def with_choices(question, answer, row, where, columns):
    """(the question with a line for each choice, the right one's label)."""
    choices = _choices(row.get(columns.choices))
    if not choices:
        return question, answer
    labels = [*choices]
    same = [label for label, text in choices.items() if text.strip() == answer]
    index = int(answer) if re.fullmatch(r"[0-9]{1,2}", answer) else len(labels)
    numbered = index < len(labels) and answer not in choices
    if numbered and (type(value_at(row, columns.answer)) is int or not same):
        label = labels[index]  # counted from 0, as in MMLU
    elif answer in choices or answer.upper() in choices:
        label = answer if answer in choices else answer.upper()
    elif len(same) == 1:
        label = same[0]
    else:
        raise UserError(f"{where}: `{columns.answer}` {answer:.30} is none of the choices "
                        f"{', '.join(labels):.40}; rename `{columns.choices}` if it is something "
                        "else")  # fmt: skip
    lines = [f"{label}. {text.strip()}" for label, text in choices.items()]
    return "\n".join([question, *lines]), label


def description(columns, where, problem):
    """One line: what was taken for what in a table, with its first problem."""
    pairs = [("question", columns.question), ("its context", columns.context),
             ("choices", columns.choices), ("answer", columns.answer),
             ("solution", columns.solution)]  # fmt: skip
    taken = ", ".join(f"{kind} from `{name}`" for kind, name in pairs if name)
    return (f"{where}: {taken}; the first: {' '.join(problem.question.split())[-40:]!r} -> "
            f"{problem.answer[:30]!r}")  # fmt: skip
