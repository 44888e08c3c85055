"""A run's files read back, and what its figures are called; plots and reports are made from this.

Nothing here needs torch or a model: config.json, metrics.jsonl and eval.jsonl are all there is.
"""

import json
from pathlib import Path
from typing import ClassVar

from utils import UserError, read_jsonl

LABELS = {
    "reward": "reward (mean over completions)",
    "reward_std": "reward std within a group",
    "kl": "KL to the reference (nats per token)",
    "entropy": "entropy (nats per token)",
    "cross_entropy": "cross-entropy of filtered tokens (nats per token)",
    "completion_length": "completion length (tokens)",
    "loss": "loss",
    "grad_norm": "gradient norm before clipping",
    "learning_rate": "learning rate",
    "clip_fraction": "clip fraction (of tokens)",
    "mismatch": "sampler-trainer mismatch (nats per token)",
    "truncated": "truncated completions",
    "flat_groups": "groups whose rewards are all equal",
    "tokens_per_second": "sampled tokens per second",
    "skipped": "updates skipped as not finite",
    "tis_capped": "tokens whose importance weight a bound holds",
    "entropy_bonus": "weight of the entropy bonus",
    "weights_changed": "weights that an update changes",
    "weights_changed_bf16": "weights that it would change, were they stored in bf16",
    "seconds": "seconds per step",
    "tokens/sampled": "tokens sampled",
    "tokens/distinct": "distinct prefixes sampled (tokens)",
    "tokens/trained": "tokens that carried gradient",
    "tokens/flat": "tokens in groups whose rewards are all equal",
    "tokens/truncated": "tokens in truncated completions",
    "tokens/told": "tokens that the world said",
    "turns": "turns of the policy's per completion",
    "tokens/padded": "padding in the attention of training passes (tokens)",
    "completions/sampled": "completions sampled",
    "peak_memory_gb": "peak memory of tensors so far (GB)",
    "completions/trained": "completions that carried gradient",
    "exploitability": "exploitability (won by the best answers; 0: perfect)",
    "legal_moves": "legal answers' share of the probability",
    "best_moves": "best moves' share, where some are worse",
    "against_random": "won a game from random play (95 % interval)",
    "against_perfect": "won a game from perfect play (95 % interval)",
    "gain/against_random": "won more than at step 0 from random play (same deals, 95 % interval)",
    "gain/against_perfect": "won more than at step 0 from perfect play (same deals, 95 % interval)",
    "exact/against_random": "won a game from random play (exact)",
    "exact/against_perfect": "won a game from perfect play (exact)",
    "accuracy": "held-out accuracy (greedy, 95 % interval)",
    "lenient_accuracy": "held-out accuracy, tags not needed (95 % interval)",
    "blind_accuracy": "held-out accuracy with other problems' pictures (95 % interval)",
    "above_blind": "held-out accuracy above that with other pictures (95 % interval)",
    "format_rate": "held-out format rate (95 % interval)",
    "referee/first_slot": "verdicts for the text that the referee reads first",
    "referee/consistent": "pairs with one verdict in both orders",
    "referee/calls": "what the referee was asked (asks)",
    "referee/cached": "what it had answered before (asks)",
    "referee/unread": "referee's answers that cannot be read (asks)",
    "eval_referee/first_slot": "verdicts for the text that the second referee reads first",
    "eval_referee/consistent": "pairs with one verdict of the second referee in both orders",
    "eval_referee/calls": "what the second referee was asked (asks)",
    "eval_referee/cached": "what the second referee had answered before (asks)",
    "eval_referee/unread": "second referee's answers that cannot be read (asks)",
    "debate/accuracy": "referee's accuracy after debates (95 % interval)",
    "debate/without": "referee's accuracy without debate (95 % interval)",
    "win_rate/referee": "held-out win rate over step 0 (95 % interval)",
    "win_rate/eval_referee": "held-out win rate over step 0, second referee (95 % interval)",
}
SHARES = {"accuracy", "lenient_accuracy", "blind_accuracy", "above_blind", "format_rate",
          "legal_moves", "best_moves", "truncated", "flat_groups", "clip_fraction", "tis_capped",
          "weights_changed",
          "weights_changed_bf16"}  # fmt: skip
SHARE_ENDS = (
    "debate/accuracy",
    "debate/without",
    "/first_slot",
    "/consistent",
    "win_rate/referee",
    "win_rate/eval_referee",
)
# How keys of eval.jsonl end that have no figure of their own.
NO_FIGURE = ("problems", "_p", "seconds/evaluation", "_low", "_high")


COINCIDE = 0.02  # of a figure's height: curves no further apart are drawn as one


def title(key, held_out=False):
    """What a metric is called, in every figure and on the page; by its name where nothing else is
    said."""
    label = LABELS.get(key, key.replace("rewards/", "reward: "))
    return f"held-out {label}" if held_out and not label.startswith("held-out") else label


def unit(key):
    """What the vertical axis of a metric's figure counts, in a word or two."""
    if is_share(key):
        return "share"
    if key.partition("/")[0] in ("reward", "rewards", "seconds"):
        return "seconds" if key.startswith("seconds") else "reward"
    label = title(key)
    _, bracket, inside = label.rstrip(")").rpartition("(")
    return inside if bracket else label


def is_share(key):
    return key in SHARES or "pass@" in key or key.endswith(SHARE_ENDS)


def coinciding(curves):
    """Which of a figure's curves, {name: (steps, values)}, run on top of each other: lists of their
    names."""
    values = [value for _, values in curves.values() for value in values]
    near = COINCIDE * (max(values, default=0) - min(values, default=0))
    groups = []
    for name, (steps, ours) in curves.items():
        for group in groups:
            others, theirs = curves[group[0]]
            if steps == others and all(abs(a - b) <= near for a, b in zip(ours, theirs)):
                group.append(name)
                break
        else:
            groups.append([name])
    return groups


BEFORE_COLD_START, AN_EIGHTH = "before the cold start", "on an eighth of the problems"

# Flags in which runs of one recipe may differ: what is learnt, and how fast, is the same.
OF_A_RUN = {
    "seed", "output_dir", "resume", "resume_or_start", "verbose", "keep_checkpoints", "prompt_date",
    "plan", "eval_iterations", "short_eval_iterations", "save_steps", "save_rollouts", "track",
    "reward_timeout", "vllm_python", "vllm_devices", "vllm_transfer", "vllm_timeout",
}  # fmt: skip


class Series:
    """One run's records: `metrics` and `evaluations` map a key to (steps, values), `intervals` a
    key of the latter to (lows, highs), `short_accuracy` the names of what --short_eval_iterations
    saw; `rows` are the lines of metrics.jsonl, `alarms` are (step, line of text)."""

    metric_ranges: ClassVar = {}  # see Mean

    def __init__(self, path):
        self.path = Path(path)
        if not (self.path / "metrics.jsonl").exists() and not (self.path / "eval.jsonl").exists():
            raise UserError(f"{path}: no run here, or nothing logged yet (no metrics.jsonl)")
        self.name = self.path.resolve().name
        config = self.path / "config.json"
        self.config = _config(config) if config.exists() else {"flags": {}}
        self.flags = self.config["flags"]
        self.rows = _rows_of_steps(self.path / "metrics.jsonl")
        self.metrics = _columns(self.rows)
        self.evaluation_rows = _rows_of_steps(self.path / "eval.jsonl")
        self.evaluations = _columns(self.evaluation_rows)
        self.short_rows = _rows_of_steps(self.path / "short_eval.jsonl")
        self.short_accuracy = {
            BEFORE_COLD_START if before else AN_EIGHTH: _columns(rows)["accuracy"]
            for before in (True, False)
            if (rows := [row for row in self.short_rows if before == ("before_cold_start" in row)])
        }
        self.intervals = {}
        for key, (steps, _) in self.evaluations.items():
            low, high = (self.evaluations.get(f"{key}_{end}") for end in ("low", "high"))
            if low and high and low[0] == high[0] == steps:
                self.intervals[key] = low[1], high[1]
        rows = sorted([*self.rows, *self.evaluation_rows], key=lambda row: row["step"])
        self.alarms = [(row["step"], line) for row in rows for line in row.get("alarms", [])]


class Mean:
    """Runs of several seeds as one, to be drawn as a `Series` is: at every step that all have, the
    mean, and in `metric_ranges` and `intervals` the lowest and the highest value.

    A seed counts once, several runs of one seed as their own mean.
    """

    def __init__(self, name, runs):
        self.name = ", ".join(filter(None, [name, _count(runs)]))
        self.flags = runs[0].flags
        self.alarms = sorted({alarm for run in runs for alarm in run.alarms})  # of any of them
        seeds = {}
        for run in runs:
            seeds.setdefault(run.flags.get("seed"), []).append(run)
        if len(seeds) > 1:
            runs = [Mean("", of_one) if len(of_one) > 1 else of_one[0] for of_one in seeds.values()]
        self.metrics, self.metric_ranges = _joined([run.metrics for run in runs])
        self.evaluations, self.intervals = _joined([run.evaluations for run in runs])
        self.short_accuracy, _ = _joined([run.short_accuracy for run in runs])


def _count(runs):
    """Runs, by their seeds, in words."""
    seeds = {run.flags.get("seed") for run in runs}
    if len(seeds) > 1:
        return f"mean of {len(seeds)} seeds"
    return (f"mean of {len(runs)} runs of " if len(runs) > 1 else "") + f"seed {seeds.pop()}"


def _joined(columns):
    means, ranges = {}, {}
    for key in sorted(set.intersection(*map(set, columns)), key=list(columns[0]).index):
        by_step = [dict(zip(*column[key])) for column in columns]
        steps = sorted(set.intersection(*map(set, by_step)))
        values = [[of_run[step] for of_run in by_step] for step in steps]
        if steps:
            means[key] = steps, [_mean(row) for row in values]
            ranges[key] = [min(row) for row in values], [max(row) for row in values]
    return means, ranges


def _mean(values):
    """Among them: that of equal values may be rounded to beside them, and no bar drawn from it."""
    return min(max(sum(values) / len(values), min(values)), max(values))


def over_seeds(runs):
    """Runs that differ in nothing but their seed as one `Mean` each, named by what differs."""
    recipes = {}
    for run in runs:
        recipe = _recipe(run)
        recipes.setdefault(json.dumps(recipe, sort_keys=True), (recipe, []))[1].append(run)
    flags = [recipe for recipe, _ in recipes.values()]
    known = dict.fromkeys(key for recipe in flags for key in recipe)
    apart = [key for key in known if len({str(recipe.get(key)) for recipe in flags}) > 1]
    return [
        Mean(", ".join(f"{key} {recipe.get(key)}" for key in apart), members)
        for recipe, members in recipes.values()
    ]


def _recipe(run):
    """A run's flags but for those that do not matter here, and its data, wherever that lies."""
    if not run.flags:
        raise UserError(f"{run.path}: no config.json, so what it shares with others is unknown")
    recipe = {key: value for key, value in run.flags.items() if key not in OF_A_RUN}
    if recipe.get("dataset_path"):
        recipe["dataset_path"] = Path(recipe["dataset_path"]).name
        recipe["problems"] = run.config.get("problems_sha256", "")[:8]
    if prompts := run.config.get("prompts_sha256"):  # with the date, where a template shows it
        recipe["prompts"] = prompts[:8]
    return recipe


def read_rows(path):
    """The objects in a .jsonl file; none where there is no file, all but a torn last line."""
    return [row for _, row in read_jsonl(path, torn_end=True)] if path.exists() else []


def _rows_of_steps(path):
    rows = read_rows(path)
    if not all(type(row.get("step")) is int for row in rows):
        raise UserError(f"{path}: a line has no `step`; no run wrote that, name another")
    return rows


def _config(path):
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return {**config, "flags": dict(config["flags"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}: damaged; without it the run can be drawn") from None


def _columns(rows):
    columns = {}
    for row in rows:
        for key, value in row.items():
            if key != "step" and isinstance(value, (int, float)):
                steps, values = columns.setdefault(key, ([], []))
                steps.append(row["step"])
                values.append(value)
    return columns


def smooth(values, window=None):
    """Moving average over `window` values, by default a tenth of them, at least 3. It is centred,
    so that the line does not lag behind; towards the ends it is over fewer."""
    reach = (window or max(3, len(values) // 10)) // 2
    averages = []
    for place in range(len(values)):
        around = min(reach, place, len(values) - 1 - place)
        near = values[place - around : place + around + 1]
        averages.append(sum(near) / len(near))
    return averages
