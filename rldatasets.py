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
from functools import partial
from pathlib import Path

import numpy as np

from reading.columns import (
    Fields,
    choices_remark,
    columns_of,
    has_numbers,
    parts_of,
    taken_from,
)
from reading.files import arrow_splits, file_splits, is_saved, read_rows, saved_splits
from reading.images import images_of
from utils import UserError, hub_token, mixed_seed

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
    `images` is what the question shows: functions without arguments that return PIL images, each
    with its `size` in pixels, (width, height), and a repr that says what it shows.
    """

    question: str
    answer: str
    solution: str
    extra: dict = field(default_factory=dict, repr=False, hash=False)
    images: tuple = field(default=(), repr=False)


class Transcript(str):
    """A text of an episode of several turns. `turns` are what the policy wrote and what the world
    answered, in turn, the policy's first and last (see `reply` in tasks/__init__.py)."""

    def __new__(cls, text, turns):
        self = super().__new__(cls, text)
        self.turns = tuple(turns)
        return self

    def __getnewargs__(self):  # to be sent from process to process
        return str(self), self.turns


def completion_fields(text):
    """A completion as a record on disk holds it; of an episode with its turns."""
    turns = {"turns": text.turns} if isinstance(text, Transcript) else {}
    return {"completion": text, **turns}


def shown_fields(problem):
    """What a record on disk says of what a problem shows: a name for each image, by its repr."""
    names = [hashlib.sha256(repr(image).encode()).hexdigest()[:16] for image in problem.images]
    return {"images": names} if names else {}


def completion_of(record):
    """The completion that such a record holds: of an episode a Transcript again."""
    text = record["completion"]
    return Transcript(text, record["turns"]) if "turns" in record else text


class Problems:
    """A fixed list of problems and the endless, shuffled stream of batches drawn from it.

    taken: a line on what they were taken from, where that was not plain to see, and `columns` its
    part that is of the table alone; remarks: what else is worth a line. together: so many problems
    that follow each other, such as both sides of a debate, stay behind each other; their number is
    a multiple of it.
    """

    def __init__(self, problems, seed, taken="", together=1, columns="", remarks=()):
        self.problems, self.seed = list(problems), seed
        self.taken, self.together = taken, together
        self.columns, self.remarks = columns, remarks

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
        rng = np.random.default_rng(mixed_seed(self.seed, epoch))
        blocks = rng.permutation(len(self) // self.together) * self.together
        return (blocks[:, None] + np.arange(self.together)).ravel()


def fingerprint(problems):
    """The SHA-256 of a list of problems."""
    text = repr(problems)
    for name in ("extra", "images"):
        values = [getattr(problem, name) for problem in problems]
        text += repr(values) if any(values) else ""
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()


def worked_answer(problem):
    """The completion a perfect student would write: the worked solution in the answer format."""
    return f"<reasoning>\n{problem.solution}\n</reasoning>\n<answer>\n{problem.answer}\n</answer>\n"


def load_problems(dataset_name, dataset_path, split, seed, difficulty=1, fields=None):
    """The Problems of one split, "train" or "test".

    dataset_name "arithmetic": generated, nothing to download. Else the rows of `dataset_path`, a
    file or a folder (see reading/files.py), or without one those of the hub's dataset: "gsm8k",
    or OWNER/NAME[/CONFIGURATION]. Which columns they are taken from, and of which splits, `fields`
    says, a reading.columns.Fields, or else what they are called.

    Of one file, or where both splits have one name, one question in five is held out for testing,
    by the hash of its first writing: all writings of one question (see `normal`) are in one split.
    Of an answer with `#### 72`, the gold one is what stands on that line. A number keeps the digits
    that the file gives it. What a row has besides reaches the rewards as `problem.extra`.

    Raises UserError, for a malformed row as `file:line: reason`.
    """
    if dataset_name == "arithmetic":
        return Problems(arithmetic_problems(split, seed, difficulty), seed)
    fields = fields or Fields()
    read, held_out, where = _source(dataset_name, dataset_path, split, fields)
    rows = read()
    flag = f"--dataset_path {dataset_path}" if dataset_path else f"--dataset_name {dataset_name}"
    nothing = UserError(f"{flag}: no problems in its {split} split; add lines (of one file, one in "
                        "five is held out)")  # fmt: skip
    if not rows:
        raise nothing
    columns = columns_of(rows, where, fields)
    if not columns.choices and has_numbers(rows, columns.answer):
        rows = read(as_written=(columns.answer,))
    folder = Path(dataset_path or ".")
    folder = folder if folder.is_dir() else folder.parent
    parts, *marks = parts_of(rows, columns)
    problems = [
        Problem(*part, images_of(row, place, folder)) for part, (place, row) in zip(parts, rows)
    ]
    first, table = problems[0], taken_from(columns, *marks)
    shown = f"{' '.join(first.question.split())[-40:]!r} -> {first.answer[:30]!r}"
    taken = f"{where}: {table}; the first: {shown}" if table else ""
    remarks = [line for line in (choices_remark(columns, where, problems),) if line]
    if held_out and Path(dataset_path or "").is_dir():
        remarks += _idle_splits(fields)
    if held_out:
        wanted, first = split == "test", {}
        firsts = [
            repr(p.images) if p.images else first.setdefault(normal(p.question), p.question)
            for p in problems
        ]
        problems = [p for p, key in zip(problems, firsts) if is_held_out(key) == wanted]
    if not problems:
        raise nothing
    return Problems(problems, seed, taken, columns=table, remarks=remarks)


def _idle_splits(fields):
    """What --train_split and --test_split do not do on one table in a folder, a line each."""
    named = {name: getattr(fields, name) for name in ("train_split", "test_split")}
    for name, split in named.items():
        if len({*named.values()}) > 1 and split != getattr(Fields, name):
            yield f"--{name} {split} does nothing on one table: one question in five is held out"


def _source(dataset_name, dataset_path, split, fields):
    """(a function that makes the [(place, row)] of a split, whether the test split is one in five
    of them, what a message calls them)."""
    if dataset_path is not None and not Path(dataset_path).is_dir():
        return partial(read_rows, dataset_path), True, dataset_path
    if dataset_path is None:
        where, splits = f"--dataset_name {dataset_name}", _hub_splits(dataset_name)
    elif is_saved(dataset_path):
        where, splits = f"--dataset_path {dataset_path}", saved_splits(dataset_path)
    else:
        where, splits = f"--dataset_path {dataset_path}", file_splits(dataset_path)
    if None in splits:
        return splits[None], True, where
    names = {"train": fields.train_split, "test": fields.test_split}
    if names[split] not in splits:
        others = ", ".join(splits)
        mend = f"there are {others:.60}: name one by --{split}_split"
        if split == "test" and names["train"] in splits:
            mend += f"; --test_split {names['train']} holds out one in five"
        raise UserError(f"{where}: no split `{names[split]}`; {mend}")
    return splits[names[split]], names["train"] == names["test"], f"{where}, {names[split]}"


def _hub_splits(name):
    """{split: a function that makes its rows} of a dataset on the hub, or in its cache."""
    from datasets import load_dataset  # takes seconds to import and only the hub needs it

    (path, config), token = hub_dataset(name), hub_token()
    try:
        return arrow_splits(load_dataset(path, config, token=token), name)
    except Exception as error:  # a library of many layers, each with errors of its own
        reason = " ".join(str(error).split())
        raise UserError(f"--dataset_name {name}: the hub did not deliver: {reason:.100}") from None


def hub_dataset(name):
    """(OWNER/NAME, configuration or None) of a dataset on the hub, None where the name is none."""
    if name == "gsm8k":
        return GSM8K_HUB_NAME, "main"
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/([\w.-]+))?", name)
    return match and (match[1], match[2])


def is_held_out(key):
    """Whether what `key` names belongs to the test split: one in five, by its hash alone."""
    return int(hashlib.sha256(key.encode()).hexdigest(), 16) % 5 == 0


def normal(question):
    """What two writings of a question have in common: white space, case and the forms of characters
    that Unicode calls compatible (NFKC) do not count."""
    folded = unicodedata.normalize("NFKC", question).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def without_overlap(train, test):
    """The training problems whose question is none of the test's, as a list, see `asked`."""
    held_out = {asked(problem) for problem in test}
    return [problem for problem in train if asked(problem) not in held_out]


def asked(problem):
    """What two problems that ask the same have in common: see `normal`, and what they show."""
    return normal(problem.question), problem.images


def whole_blocks(problems, kept, together):
    """Those of the `kept` problems, a part of `problems`, whose whole block of `together` is kept,
    see Problems."""
    if together == 1:
        return kept
    ids = {id(problem) for problem in kept}
    blocks = (problems[n : n + together] for n in range(0, len(problems), together))
    return [p for block in blocks if all(id(q) in ids for q in block) for p in block]


def repeats(problems):
    """How many of these problems ask what one before them asks, see `asked`."""
    return len(problems) - len({asked(problem) for problem in problems})


def some_of(problems, count, in_order=False, together=1):
    """`count` of the test problems, a list, or all where count is 0 or more than there are.

    They are the first of a shuffle that is the same for every seed, in their old order, so that
    fewer are among more. in_order: the first themselves, for problems that come in random order.
    together: they come in whole blocks, see Problems, the last of which may be beyond `count`.
    """
    if count == 0 or count >= len(problems):
        return list(problems)
    if in_order:
        return problems[:count]
    order = np.random.default_rng(mixed_seed("test")).permutation(len(problems) // together)
    blocks = sorted(order[: -(-count // together)])
    return [problems[block * together + place] for block in blocks for place in range(together)]


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
