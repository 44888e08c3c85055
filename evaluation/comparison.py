"""What held-out answers say: one evaluation in figures, and two runs compared.

Everything comes from an evaluation's records, a line per question in completions/eval_XXXXX.jsonl.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from textwrap import shorten

from evaluation.blind import blind_figures
from evaluation.significance import (
    NOISE,
    gained_and_lost,
    mcnemar_p,
    mean_interval,
    paired_difference,
    pass_at_k,
    wilson_interval,
    with_interval,
)
from utils import UserError, read_jsonl, table

# A share of the questions, and the key of a record that says whether a question counts.
SHARES = {"accuracy": "correct", "lenient_accuracy": "lenient_correct", "format_rate": "format"}
NEEDED = ("question", "answer", "completion", "correct")  # of every record that is compared


def summarize(records):
    """One evaluation in figures: shares with their 95 % Wilson intervals, pass@k, means."""
    summary = {"problems": len(records)}
    for name, key in SHARES.items():
        count = sum(record[key] for record in records)
        bounds = wilson_interval(count, len(records))
        summary |= with_interval(name, count / len(records), *bounds)
    summary |= blind_figures(records)
    for name, chances in pass_rates(records).items():
        # Chances vary less than right and wrong do: a little too wide, and exact for all samples.
        bounds = wilson_interval(sum(chances), len(chances))
        summary |= with_interval(name, fmean(chances), *bounds)
    summary["completion_length"] = fmean(record["length"] for record in records)
    summary["truncated"] = fmean(not record["finished"] for record in records)
    if any("truncated_thinking" in record for record in records):
        cut_off = [record.get("truncated_thinking", False) for record in records]
        summary["truncated_thinking"] = fmean(cut_off)
    for name in records[0]["rewards"]:
        summary[f"rewards/{name}"] = fmean(record["rewards"][name] for record in records)
    return summary


def pass_rates(records):
    """{"pass@1": the chance for each question, ...} for k = 1, 2, 4, ... and all samples, strict
    and lenient; {} where no samples were drawn."""
    if not all(record.get("samples") for record in records):
        return {}
    n = min(len(record["samples"]) for record in records)
    powers = {2**i for i in range(n.bit_length())}
    return {
        f"{prefix}pass@{k}": [
            pass_at_k(len(samples), sum(sample[key] for sample in samples), k)
            for samples in (record["samples"] for record in records)
        ]
        for prefix, key in (("", "correct"), ("lenient_", "lenient_correct"))
        for k in sorted({*powers, n})
    }


def paired(first, second):
    """Two evaluations' records in one order, question by question; None where they answered
    different questions."""

    def key(record):
        return record["question"], record["answer"]

    first, second = sorted(first, key=key), sorted(second, key=key)
    return (first, second) if list(map(key, first)) == list(map(key, second)) else None


def p_against(first, records):
    """McNemar's p-value of the change in accuracy; None where the questions are not the same."""
    pairs = paired(first, records)
    if pairs is None:
        return None
    return mcnemar_p(*gained_and_lost(*([row["correct"] for row in side] for side in pairs)))


def gains(first, games):
    """What a game against each opponent is worth more than at step 0, on the same deals, with its
    95 % interval over these. first, games: an evaluation's records of games."""
    before = {row["against"]: row["won_per_deal"] for row in first if "won_per_deal" in row}
    figures = {}
    for row in games:
        if (name := row.get("against")) in before and "won_per_deal" in row:
            more = [new - old for old, new in zip(before[name], row["won_per_deal"], strict=True)]
            figures |= with_interval(f"gain/against_{name}", *mean_interval(more))
    return figures


def evaluation_table(columns):
    """Lines that show evaluations side by side. columns: {title: summary}."""
    keys = dict.fromkeys(key for summary in columns.values() for key in summary)
    names = [key for key in keys if key != "problems" and not key.endswith(("_low", "_high"))]
    rows = [(name, *(_cell(name, summary) for summary in columns.values())) for name in names]
    lines = table([("held-out, greedy", *columns), *rows])
    problems = next(iter(columns.values()))["problems"]
    notes = [f"{problems} problems; in brackets the 95 % interval."]
    if "mcnemar_p" in names:
        notes.append("mcnemar_p: the exact test of accuracy against step 0 on the same questions; "
                     "0.05 or more is noise.")  # fmt: skip
    if "above_blind" in names:
        notes.append("blind_accuracy: the same questions with other problems' pictures; "
                     "above_blind: accuracy less that, question by question.")  # fmt: skip
    return [*lines, lines[1], *notes]


def _cell(key, summary):
    value = summary.get(key)
    if value is None:
        return ""
    if f"{key}_low" in summary:
        ends = value, summary[f"{key}_low"], summary[f"{key}_high"]
        if key.startswith("against_"):  # what was won a game is no share
            return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*ends)
        return interval(*ends)
    if key.startswith("truncated"):
        return f"{value:.1%}"
    return f"{value:.3g}"


# --- two runs ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a run: `name` is RUN@STEP, `config` what its config.json holds."""

    name: str
    records: list
    config: dict

    @property
    def flags(self):
        return self.config.get("flags", {})


def read_evaluation(place):
    """The Evaluation at RUN or RUN@STEP, the last one where no step is given.

    Raises UserError where there is none.
    """
    path, at, step = place.rpartition("@")
    if not (at and step.isascii() and step.isdigit()) or os.path.isdir(place):
        path, step = place, None
    folder = Path(path)
    if not os.path.isdir(folder):
        raise UserError(f"{path}: no such directory; name a run's, e.g. runs/demo or runs/demo@20")
    files = {}
    for file in (folder / "completions").glob("eval_*.jsonl"):
        number = file.stem.removeprefix("eval_")
        if number.isdigit():
            files[int(number)] = file
    if not files:
        raise UserError(f"{path}: no evaluation there (no completions/eval_XXXXX.jsonl)")
    step = max(files) if step is None else int(step)
    if step not in files:
        steps = shorten(" ".join(map(str, sorted(files))), 60, placeholder=" ...")
        raise UserError(f"{path}: no evaluation of step {step}; there are {steps}")
    records = [record for _, record in read_jsonl(files[step])]
    if not records or any(key not in record for record in records for key in NEEDED):
        raise UserError(f"{files[step]}: not an evaluation's records ({', '.join(NEEDED)})")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = {**config, "flags": {**config["flags"]}}
    except (OSError, ValueError, KeyError, TypeError):
        config = {}
    return Evaluation(f"{path}@{step}", records, config)


def compare(first, second, show):
    """Two Evaluations of the same questions as a text: both in figures, the difference and whether
    it is more than noise, and up to `show` questions gained and lost, whole.

    Raises UserError where the questions are not the same.
    """
    if first.name == second.name:
        raise UserError(f"{first.name}: is compared with itself; name another run, or a step")
    pairs = paired(first.records, second.records)
    if pairs is None:
        common = {row["question"] for row in first.records}
        common &= {row["question"] for row in second.records}
        raise UserError(f"these runs answered different questions: {len(first.records)} and "
                        f"{len(second.records)}, of which {len(common)} in common")  # fmt: skip
    other = differences(first, second)
    return "\n".join([
        *(f"{letter}  {described(side)}" for letter, side in zip("AB", (first, second))),
        *([f"Note: not only the models differ: {', '.join(other)}."] if other else []),
        "",
        *table([("held-out", "A", "B", "B - A", "p"), *share_rows(*pairs), *mean_rows(*pairs)]),
        f"{len(pairs[0])} questions; in brackets 95 % intervals; p: McNemar's exact test.",
        "All of it is about these two models: another seed of a training makes another model.",
        "",
        *verdict(*pairs, other),
        *examples(*pairs, show),
    ])  # fmt: skip


def described(evaluation):
    flags = evaluation.flags
    facts = [str(flags[key]) for key in ("model_name", "dataset_name") if key in flags]
    if "max_completion_length" in flags:
        facts.append(f"up to {flags['max_completion_length']} tokens")
    return "  ".join([evaluation.name, ", ".join(facts)]).rstrip()


def differences(first, second):
    """What besides the models differs between two Evaluations of the same questions, in words. What
    one side did not write down, as runs of before did not, is not compared."""
    found = []
    if any(a != b for a, b in zip(*(prompts(side.records) for side in (first, second)))):
        found.append("prompts")
    if differ(first.config, second.config, "verdict_sha256"):
        found.append("is_correct")
    flags = ("dataset_name", "difficulty", "max_completion_length", "stop")
    return found + [f"--{name}" for name in flags if differ(first.flags, second.flags, name)]


def prompts(records):
    """The prompts that were answered, in the order of their questions; none where not all know."""
    known = all("prompt" in record for record in records)
    ordered = sorted(records, key=lambda record: (record["question"], record["answer"]))
    return [record["prompt"] for record in ordered] if known else []


def differ(first, second, name):
    return None not in (first.get(name), second.get(name)) and first[name] != second[name]


def shares(records):
    """{name: whether each question counts} for the shares that all these records know."""
    known = {
        name: [bool(record[key]) for record in records]
        for name, key in SHARES.items()
        if all(key in record for record in records)
    }
    if all("finished" in record for record in records):
        known["truncated"] = [not record["finished"] for record in records]
    return known


def share_rows(first, second):
    before, after = shares(first), shares(second)
    for name in before:
        if name in after:
            sides = (before[name], after[name])
            yield (name, *map(share, sides), points(*paired_difference(*sides)),
                   f"{mcnemar_p(*gained_and_lost(*sides)):.2g}")  # fmt: skip


def mean_rows(first, second):
    before, after = pass_rates(first), pass_rates(second)
    for name in before:
        if name in after:
            sides = (before[name], after[name])
            gaps = [y - x for x, y in zip(*sides)]
            yield (name, *map(share, sides), points(*mean_interval(gaps)), "")
    if all("length" in record for record in (*first, *second)):
        a, b = (fmean(record["length"] for record in side) for side in (first, second))
        yield "completion_length", f"{a:.1f}", f"{b:.1f}", f"{round(b - a, 1) + 0:+.1f}", ""


def share(values):
    return interval(fmean(values), *wilson_interval(sum(values), len(values)))


def interval(value, low, high):
    """A share with its interval, as every table here shows it."""
    return f"{value:.1%} [{low:.1%}, {high:.1%}]"


def points(difference, low, high):
    return f"{100 * difference:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"


def verdict(first, second, other):
    """What the figures allow one to say, in one or two lines. `other`: see differences."""
    before, after = shares(first), shares(second)
    found = {}
    for name in ("accuracy", "lenient_accuracy"):
        if name in before and name in after:
            difference, low, high = paired_difference(before[name], after[name])
            p = mcnemar_p(*gained_and_lost(before[name], after[name]))
            beyond_noise = p < NOISE and not low <= 0 <= high
            found[name] = beyond_noise, f"{points(difference, low, high)}, p = {p:.2g}", difference
    beyond_noise, figures, difference = found["accuracy"]
    if not beyond_noise:
        yield f"The difference in accuracy, {figures}, is within the noise."
        return
    if other:
        yield (f"Accuracy differs, {figures}, but so does {', '.join(other)}: neither is called "
               "better.")  # fmt: skip
        return
    yield f"{'B' if difference > 0 else 'A'} is better: accuracy {figures}."
    if "lenient_accuracy" in found and not found["lenient_accuracy"][0]:
        yield (f"Tags or none, the difference, {found['lenient_accuracy'][1]}, is within the "
               "noise: what differs may be the format alone.")  # fmt: skip


def examples(first, second, show):
    """The questions that only one side answered: their number, and up to `show` of each, whole."""
    pairs = list(zip(first, second))
    gained = [pair for pair in pairs if pair[1]["correct"] and not pair[0]["correct"]]
    lost = [pair for pair in pairs if pair[0]["correct"] and not pair[1]["correct"]]
    yield f"{len(gained)} questions gained (only B is right), {len(lost)} lost (only A is right)."
    for word, some in (("gained", gained), ("lost", lost)):
        for number, (a, b) in enumerate(some[:show], start=1):
            yield from ("", f"--- {word}, {number} of {len(some)} ".ljust(80, "-"))
            yield from (printable(a["question"]), f"gold answer: {printable(a['answer'])}")
            for letter, record in (("A", a), ("B", b)):
                yield f"--- {letter}, {'right' if record['correct'] else 'wrong'}:"
                yield printable(record["completion"]).rstrip("\n")


def printable(text):
    """The text without control characters: what a model wrote must not steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
