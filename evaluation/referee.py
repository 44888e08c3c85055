"""A referee: whoever can be asked which of two texts is better, and what a group earns by it.

Every pair is asked in both orders, and half the difference of the two log-odds counts, so that a
liking for the first place cancels exactly:

    m = ((A over B | a first) - (A over B | b first)) / 2        p(a beats b) = sigmoid(m / tau)

A margin that the referee cannot tell is a tie, see Scale: within a group, differences that are
noise would else be blown up to full advantages by the division by the group's deviation (Pref-GRPO,
arXiv 2508.20751). What was answered once is kept, in memory and in a file of the run's, so that the
same question costs nothing and has the same answer.
"""

import functools
import hashlib
import json
import math
import os
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from evaluator import extract_answer
from tasks import wants
from tasks.asks import SYSTEM, Ask
from utils import TimedOut, UserError, as_number, not_counted, time_limit

START = "start"  # as the name of a referee: the model that the run starts with
REMEMBERED = 1_000_000  # answers kept in memory, some 200 MB; the oldest go


@dataclass(frozen=True)
class Scale:
    """How a referee's margins become chances: below `tie` it cannot tell, `tau` is a usual margin.
    tau 0: whoever is ahead has won."""

    tau: float = 1.0
    tie: float = 1e-3  # above the rounding of batches of other shapes

    def chance(self, margin):
        """That the first beats the second; None stays None."""
        if margin is None:
            return None
        if abs(margin) <= self.tie:
            return 0.5
        # The sigmoid of margin / tau, however large that is.
        return float(margin > 0) if self.tau == 0 else (1 + math.tanh(margin / self.tau / 2)) / 2


@dataclass
class Lap:
    """What was asked since the last look: {key: (ask, answer, whether it was new)}, and the two
    answers to each pair of texts."""

    asked: dict = field(default_factory=dict)
    pairs: dict = field(default_factory=dict)


class Referee:
    """Asks a judge, and remembers. `judge`: has a `name`, says `log_odds(asks)`, a list with None
    where it gave no answer that can be read, and has the `scale` of its margins; where it may fail
    on the way, at_once is the number of asks whose answers are kept together."""

    def __init__(self, judge, task, opponents=0, file=None):
        self.judge, self.task, self.opponents, self.file = judge, task, opponents, file
        self.scales = {}  # {(criterion, alone): Scale}, where golden pairs have set one
        self.answers = {}  # {key: log-odds or None}
        self.waiting = None  # asks, while they are only collected
        self.lap, self.is_new = Lap(), False
        if file is not None:  # and those of the run's other processes beside it
            files = sorted(Path(file).parent.glob("referee*.jsonl"))
            for path in files:
                self.answers |= answers_in(path, judge.name)
            self.is_new = not self.answers and any(path.stat().st_size for path in files)
            cut_torn_end(file)

    @property
    def rubric(self):
        return self.task.rubric

    def win_rates(self, problem, completions, criterion=None, alone=False, pivot=False):
        """For each completion, its mean chance to beat another of the group; copies tie.

        G (G - 1) asks where all differ, and with --referee_pairs K at most 2 K G: each meets the K
        that follow it on a ring, in an order that its hash decides. pivot: each meets one of them,
        2 (G - 1) asks (BRPO, arXiv 2506.00103). alone: each is asked about alone, G asks, and the
        two answers are compared. Equal texts earn the same whatever their order.
        """
        texts = [self.shown(completion) for completion in completions]
        ring = sorted(set(texts), key=lambda text: _digest(problem.question, text))
        if pivot:
            chances = self.prefers(problem, [(text, ring[0]) for text in ring], criterion, alone)
            rates = dict(zip(ring, chances))
            return [0.5 if rates[text] is None else rates[text] for text in texts]
        near = self.opponents if 0 < 2 * self.opponents < len(ring) - 1 else None
        pairs = [
            (text, ring[(place + step) % len(ring)])
            for place, text in enumerate(ring)
            for step in range(1, (near or len(ring) - 1 - place) + 1)
        ]
        if alone:
            pairs = [(a, b) for place, a in enumerate(ring) for b in ring[place + 1 :]]
        games = {text: [(0.5, texts.count(text) - 1)] for text in ring}  # (chance, how many)
        for (a, b), chance in zip(pairs, self.prefers(problem, pairs, criterion, alone)):
            if chance is not None:
                games[a].append((chance, texts.count(b)))
                games[b].append((1 - chance, texts.count(a)))
        rates = {}
        for text, of_text in games.items():
            count = sum(n for _, n in of_text)
            rates[text] = math.fsum(c * n for c, n in of_text) / count if count else 0.5
        return [rates[text] for text in texts]

    def prefers(self, problem, pairs, criterion=None, alone=False):
        """The chance that the first of each pair of texts beats the second, by a criterion, the
        task's by default: 0.5 where the referee cannot tell, None where no answer can be read."""
        criterion = criterion or self.task.criterion
        asked = [(problem.question, *map(self.shown, pair)) for pair in pairs]
        scale = self.scale(criterion, alone)
        return [scale.chance(margin) for margin in self.margins(asked, criterion, alone)]

    def scale(self, criterion, alone=False):
        return self.scales.get((criterion, alone), self.judge.scale)

    def margins(self, pairs, criterion, alone=False):
        """Half the difference of the two answers to each pair, (question, text, text); 0 for equal
        texts, None where no answer can be read. All are asked in one batch."""
        asks = {}
        for question, a, b in pairs:
            both = ((a, None), (b, None)) if alone else ((a, b), (b, a))
            if a != b:
                asks[question, a, b] = [Ask(criterion, question, *texts) for texts in both]
        flat = [ask for of_pair in asks.values() for ask in of_pair]
        if self.waiting is not None:
            self.waiting += flat
            return [0.0] * len(pairs)
        with not_counted():  # a reward's time is its own
            answers = dict(zip(flat, self.answer(flat)))
        found = {}
        for pair, of_pair in asks.items():
            one, other = (answers[ask] for ask in of_pair)
            found[pair] = None if None in (one, other) else (one - other) / 2
            if not alone:
                self.lap.pairs[frozenset(map(self.key, of_pair))] = one, other
        return [found.get(pair, 0.0) for pair in pairs]

    def shown(self, completion):
        """What it reads of a completion: where the task asks for an answer in tags, that alone, or
        leaving the tags out would show it more."""
        if "<answer>" not in self.task.system_prompt:
            return completion.strip()
        return extract_answer(completion) or ""

    def ahead(self, functions, groups, problems, timeout=None):
        """Answer in one batch what these rewards are going to ask: they are called once with every
        answer a tie, and only their questions are kept. What fails is left for the real call."""
        self.waiting = []
        try:
            for function in functions:
                for texts, problem in zip(groups, problems):
                    with suppress(Exception, TimedOut), time_limit(timeout):
                        function(list(texts), problem)
            asks = self.waiting
        finally:
            self.waiting = None
        self.answer(asks)

    def answer(self, asks):
        """The log-odds of every ask, from memory or from the judge."""
        keys = [self.key(ask) for ask in asks]
        new = {key: ask for key, ask in zip(keys, asks) if key not in self.answers}
        todo = [*new.items()]
        size = getattr(self.judge, "at_once", 0) or len(todo) or 1
        for part in (dict(todo[n : n + size]) for n in range(0, len(todo), size)):
            values = (as_number(value) for value in self.judge.log_odds([*part.values()]))
            self.remember(dict(zip(part, values)))
        answers = [self.answers[key] for key in keys]
        for key, ask, value in zip(keys, asks, answers):
            self.lap.asked.setdefault(key, (ask, value, key in new))
        for key in [*islice(self.answers, max(0, len(self.answers) - REMEMBERED))]:
            del self.answers[key]
        return answers

    def key(self, ask):
        return _digest(self.judge.name, SYSTEM, ask.text)

    def remember(self, answers):
        """Keep answers, in the file in one line: what a run that dies leaves of it counts whole or
        not at all, or the next batch would not be the one that it was."""
        self.answers |= answers
        if self.file is not None:
            with open(self.file, "a", encoding="utf-8") as lines:
                lines.write(json.dumps({"referee": self.judge.name, "log_odds": answers}) + "\n")
                lines.flush()
                os.fsync(lines.fileno())

    def counts(self):
        """What was asked since the last look, as numbers that add up over processes; see
        `shares`."""
        lap, self.lap = self.lap, Lap()
        read = [v for ask, v, _ in lap.asked.values() if ask.second is not None and v is not None]
        both = [pair for pair in lap.pairs.values() if None not in pair]
        return {
            "calls": sum(new for *_, new in lap.asked.values()),
            "cached": sum(not new for *_, new in lap.asked.values()),
            "unread": sum(value is None for _, value, _ in lap.asked.values()),
            "verdicts": len(read),
            "first": sum(value > 0 for value in read),
            "pairs": len(both),
            "agreeing": sum(one * other < 0 for one, other in both),
        }


def shares(counts, prefix="referee"):
    """Counts as metrics: the share of verdicts for the text that is shown first, and of pairs whose
    verdict is the same in both orders, where there were any."""
    metrics = {f"{prefix}/{name}": int(counts[name]) for name in ("calls", "cached", "unread")}
    if counts["verdicts"]:
        metrics[f"{prefix}/first_slot"] = float(counts["first"] / counts["verdicts"])
    if counts["pairs"]:
        metrics[f"{prefix}/consistent"] = float(counts["agreeing"] / counts["pairs"])
    return metrics


def answers_in(path, name):
    """The answers of the judge of this name in a file of `remember`'s, but for a last line that was
    cut off."""
    answers = {}
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line)
                answers |= row["log_odds"] if row["referee"] == name else {}
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path}:{number}: no referee's answers; remove the line, and they "
                                "are asked anew") from None  # fmt: skip
    return answers


def cut_torn_end(path):
    """Take away a last line of a file that was cut off, lest the next one be written behind it."""
    if Path(path).exists():
        with open(path, "rb+") as lines:
            lines.truncate(lines.read().rfind(b"\n") + 1)


def bound(function, **given):
    """A reward that takes `referee` or `step` with these given; as it is where it takes none of
    them."""
    given = {name: value for name, value in given.items() if wants(function, name)}
    if not given:
        return function

    @functools.wraps(function)
    def asking(completions, problem, **more):
        return function(completions, problem, **more, **given)

    return asking


def _digest(*parts):
    return hashlib.sha256("\0".join(parts).encode(errors="backslashreplace")).hexdigest()[:32]
