"""`Problem`s, the batches drawn from them, and the system prompt.

GSM8K (Cobbe et al. 2021, arXiv 2110.14168), 7,473 train and 1,319 test problems. One of them:

    question  Natalia sold clips to 48 of her friends in April, and then she sold half as many clips
              in May. How many clips did Natalia sell altogether in April and May?
    answer    Natalia sold 48/2 = <<48/2=24>>24 clips in May.
              Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.
              #### 72

The official grader is https://github.com/openai/grade-school-math/blob/master/grade_school_math/
dataset.py: the number after `####`, commas removed, must match.
"""

import hashlib
import operator
import random
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from utils import UserError, mixed_seed, read_jsonl

SYSTEM_PROMPT = """Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>
"""

BUILT_IN = ("gsm8k", "arithmetic")  # the datasets in here; the others are files in tasks/
GSM8K_HUB_NAME = "openai/gsm8k"
ARITHMETIC_SIZES = {"train": 4096, "test": 1024}


@dataclass(frozen=True)
class Problem:
    """One question with its final answer and a worked solution (which may be empty).

    `extra` is what else a reward may need: the other fields of the problem's line in a file.
    """

    question: str
    answer: str
    solution: str
    extra: dict = field(default_factory=dict, repr=False, hash=False)


class Problems:
    """A fixed list of problems and the endless, shuffled stream of batches drawn from it."""

    def __init__(self, problems, seed):
        self.problems, self.seed = list(problems), seed

    def __len__(self):
        return len(self.problems)

    def __getitem__(self, index):
        return self.problems[index]

    def batch(self, step, size):
        """The `size` problems of step `step`, a pure function of (seed, step).

        Every pass over the data is shuffled anew and the next one starts where it ends, so it never
        runs out. Negative steps are valid and precede step 0: the cold start lives there.
        """
        positions = range(step * size, (step + 1) * size)
        epochs = {position // len(self) for position in positions}
        orders = {epoch: self._order(epoch) for epoch in epochs}
        return [self[orders[p // len(self)][p % len(self)]] for p in positions]

    def _order(self, epoch):
        return np.random.default_rng(mixed_seed(self.seed, epoch)).permutation(len(self))


def fingerprint(problems):
    """The SHA-256 of a list of problems."""
    extras = [problem.extra for problem in problems]
    text = repr(problems) + (repr(extras) if any(extras) else "")
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()


def worked_answer(problem):
    """The completion a perfect student would write: the worked solution in the answer format."""
    return f"<reasoning>\n{problem.solution}\n</reasoning>\n<answer>\n{problem.answer}\n</answer>\n"


def load_problems(dataset_name, dataset_path, split, seed, difficulty=1):
    """The problems of one split, "train" or "test".

    dataset_name "gsm8k": from the hub, or from `dataset_path`, a directory with the official
    train.jsonl and test.jsonl. "arithmetic": generated, nothing to download. `dataset_path` may
    also be one .jsonl file of your own with `question` (or `problem`) and `answer` on every line
    (and, optionally, `solution`; further fields reach the rewards as `problem.extra`); one question
    in five is held out as its test split, by the hash of its first writing: all writings of one
    question (see `normal`) are in one split. Of an answer with `#### 72`, the gold one is what
    stands on that line. A number keeps the digits that the file gives it.

    Raises UserError, for a malformed row as `file:line: reason`.
    """
    if dataset_name == "arithmetic":
        return Problems(arithmetic_problems(split, seed, difficulty), seed)
    if dataset_path is None:
        from datasets import load_dataset  # takes seconds to import and only the hub needs it

        try:
            rows = load_dataset(GSM8K_HUB_NAME, "main", split=split)
        except Exception as error:  # a library of many layers, each with errors of its own
            reason = " ".join(str(error).split())[:100]
            raise UserError(f"--dataset_name gsm8k: the hub did not deliver: {reason}") from None
        problems = [_problem_from_row(row, f"{GSM8K_HUB_NAME}:{i}") for i, row in enumerate(rows)]
    elif Path(dataset_path).is_dir():
        problems = _problems_from_file(Path(dataset_path) / f"{split}.jsonl")
    else:
        wanted, first = split == "test", {}
        problems = _problems_from_file(Path(dataset_path))
        firsts = [first.setdefault(normal(p.question), p.question) for p in problems]
        problems = [p for p, key in zip(problems, firsts) if is_held_out(key) == wanted]
    if not problems:
        raise UserError(f"--dataset_path {dataset_path}: no problems in its {split} split; add "
                        "lines (of one file, one in five is held out)")  # fmt: skip
    return Problems(problems, seed)


def is_held_out(key):
    """Whether what `key` names belongs to the test split: one in five, by its hash alone."""
    return int(hashlib.sha256(key.encode()).hexdigest(), 16) % 5 == 0


def normal(question):
    """What two writings of a question have in common: white space, case and the forms of characters
    that Unicode calls compatible (NFKC) do not count."""
    folded = unicodedata.normalize("NFKC", question).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def without_overlap(train, test):
    """The training problems whose question is none of the test's, as a list, see `normal`."""
    held_out = {normal(problem.question) for problem in test}
    return [problem for problem in train if normal(problem.question) not in held_out]


def repeats(problems):
    """How many of these problems ask what one before them asks, see `normal`."""
    return len(problems) - len({normal(problem.question) for problem in problems})


def some_of(problems, count, in_order=False):
    """`count` of the test problems, a list, or all where count is 0 or more than there are.

    They are the first of a shuffle that is the same for every seed, in their old order, so that
    fewer are among more. in_order: the first themselves, for problems that come in random order.
    """
    if count == 0 or count >= len(problems):
        return list(problems)
    if in_order:
        return problems[:count]
    order = np.random.default_rng(mixed_seed("test")).permutation(len(problems))
    return [problems[index] for index in sorted(order[:count])]


# Files that people have, and what reads them in pandas.
OTHER_FORMS = {".parquet": "read_parquet", ".csv": "read_csv", ".tsv": "read_table",
               ".arrow": "read_feather", ".xlsx": "read_excel"}  # fmt: skip


def _problems_from_file(path):
    suffix = Path(path).suffix.lower()
    if suffix in OTHER_FORMS:
        raise UserError(f"{path}: is {suffix[1:]}; make it .jsonl by pandas.{OTHER_FORMS[suffix]}"
                        "(FILE).to_json(NEW, orient='records', lines=True)")  # fmt: skip
    rows = read_jsonl(path, as_written=("answer",))
    return [_problem_from_row(row, f"{path}:{line}") for line, row in rows]


def _problem_from_row(row, where):
    name = "problem" if "problem" in row and "question" not in row else "question"
    question, whole = _field(row, name, where), _field(row, "answer", where)
    if not question or not whole:
        missing = "answer" if question else "question"
        others = ", ".join(f"`{key:.20}`" for key in row if key not in ("question", "answer"))
        there = f" (there are {others:.60}: rename it)" if missing not in row and others else ""
        raise UserError(f"{where}: `{missing}` is missing or empty; every line needs one{there}")
    solution, mark, answer = whole.rpartition("####")
    answer = answer.strip().partition("\n")[0] if mark else answer
    if mark and not answer:
        raise UserError(f"{where}: nothing after #### in `answer`; the answer belongs there")
    # <<48/2=24>> are calculator calls for GSM8K's own models, not part of the text.
    solution = re.sub(r"<<[^<>]*>>", "", _field(row, "solution", where) or solution)
    extra = {key: row[key] for key in row if key not in (name, "answer", "solution")}
    return Problem(question, answer.strip(), solution.strip(), extra)


def _field(row, name, where):
    """A field's text, "" where it is missing; numbers of an answer have become text by now."""
    value = row.get(name)
    if not isinstance(value, str | None):
        raise UserError(f"{where}: `{name}` is {str(value)[:40]}; expected text"
                        + (" or a finite number" if name == "answer" else ""))  # fmt: skip
    text = (value or "").strip()
    if re.search("[\ud800-\udfff]", text):
        raise UserError(f"{where}: `{name}` holds half a character (\\ud800 to \\udfff); remove it")
    return text


# --- arithmetic: generated word problems -------------------------------------------------------

NAMES = "Anna Ben Carla David Emma Felix Grace Hugo Iris Jonas Kira Leo Mia Noah Olga Paul".split()
THINGS = "apples books cards coins eggs flowers marbles pencils plums shells stamps tickets".split()
CALCULATE = {"+": operator.add, "-": operator.sub, "*": operator.mul}
START = "{name} has {a} {things}."
START_WITH_BOXES = "{name} has {a} boxes with {b} {things} in each box."
EVENTS = {
    "+": (
        "{name} buys {n} more {things}.",
        "{name} finds {n} more {things}.",
        "{friend} brings {name} {n} more {things}.",
        "{name} gets {n} more {things} as a present.",
    ),
    "-": (
        "{name} gives away {n} {things} to {friend}.",
        "{name} loses {n} of the {things}.",
        "{friend} takes away {n} of the {things}.",
        "{name} sells {n} of the {things}.",
    ),
}
QUESTION = "How many {things} does {name} have now?"


@dataclass(frozen=True)
class Difficulty:
    """What the problems of one level hold: the largest operand, the events, a product first."""

    largest: int
    events: int
    product: bool


DIFFICULTIES = {
    1: Difficulty(largest=20, events=1, product=False),
    2: Difficulty(largest=50, events=1, product=False),
    3: Difficulty(largest=20, events=2, product=False),
    4: Difficulty(largest=12, events=1, product=True),
    5: Difficulty(largest=99, events=3, product=True),
}


def arithmetic_problems(split, seed, difficulty=1):
    """Distinct word problems of one `difficulty` (a key of DIFFICULTIES) with worked solutions.

    A calculation (its numbers and operations, whatever the story around it) belongs to one split
    alone: the test split asks for sums that training never shows. The test split is the same for
    every seed, so that runs can be compared question by question.
    """
    level = DIFFICULTIES[difficulty]
    rng = random.Random("test" if split == "test" else seed)
    problems = {}
    while len(problems) < ARITHMETIC_SIZES[split]:
        problem, calculation = _arithmetic_problem(rng, level)
        if is_held_out(calculation) == (split == "test"):
            problems.setdefault(problem.question, problem)
    return list(problems.values())


def _arithmetic_problem(rng, level):
    """One random problem, and what it calculates as text, e.g. "5+7 12-3" for 7 + 5 - 3."""

    def operand():
        return rng.randint(2, level.largest)

    name, friend = rng.sample(NAMES, 2)
    words = {"name": name, "friend": friend, "things": rng.choice(THINGS)}
    total = operand()
    events = [(rng.choice("+-"), operand()) for _ in range(level.events)]
    if level.product:
        per_box = rng.randint(2, min(level.largest, 12))
        sentences = [START_WITH_BOXES.format(a=total, b=per_box, **words)]
        steps = [(total, "*", per_box)]
        total *= per_box
    else:
        operation, n = events[0]
        if operation == "-" and n > total:  # nobody gives away more than there is
            total, events[0] = n, ("-", total)
        sentences, steps = [START.format(a=total, **words)], []
    for operation, n in events:
        operation = "+" if n > total else operation
        sentences.append(rng.choice(EVENTS[operation]).format(n=n, **words))
        steps.append((total, operation, n))
        total = CALCULATE[operation](total, n)
    question = " ".join([*sentences, QUESTION.format(**words)])
    solution = "\n".join(f"{a} {op} {b} = {CALCULATE[op](a, b)}" for a, op, b in steps)
    # 7 + 5 and 5 + 7 are one calculation.
    ordered = [(a, op, b) if op == "-" else (min(a, b), op, max(a, b)) for a, op, b in steps]
    calculation = " ".join(f"{a}{op}{b}" for a, op, b in ordered)
    return Problem(question, str(total), solution), calculation
