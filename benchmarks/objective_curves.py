"""What each objective does on the demo: its curve beside that of what it changes, seed by seed.

All start from the cold-started model of their seed and take a short run of the demo's steps. Two
runs are compared on the same questions in the same order. Runs that have ended are read, not run
again; so --only and --seeds may be done bit by bit.

    python benchmarks/objective_curves.py --output_dir runs/objectives

Writes objectives.png there, and prints the table of docs/objectives.md.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from common import ROOT, table
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from evaluation.significance import paired_difference
from records.files import Mean, Series, read_rows

ALONE = ["--reward_weights", "integer_format=0", "strict_format=0", "soft_format=0", "tag_count=0"]
TWICE, BF16 = ["--num_inner_epochs", "2"], ["--precision", "bf16"]
# {name: (the run it is compared with, flags)}
OBJECTIVES = {
    "default": (None, []),
    "batch_std": ("default", ["--advantage_scale", "batch_std"]),
    "gdpo": ("default", ["--advantage_scale", "gdpo"]),
    "entropy_target": ("default", ["--entropy_bonus", "0.1", "--entropy_target", "0.4"]),
    "top_entropy": ("default", ["--top_entropy", "0.2"]),
    "correctness_alone": ("default", ALONE),
    "max_rl": ("correctness_alone", [*ALONE, "--advantage_scale", "max_rl"]),
    "two_epochs": ("default", TWICE),
    "sapo": ("two_epochs", [*TWICE, "--clip", "sapo"]),
    "gmpo": ("two_epochs", [*TWICE, "--clip", "gmpo", "--clip_epsilon", "0.4"]),
    "clip_delta": ("two_epochs", [*TWICE, "--clip_delta", "4"]),
    "bf16": ("default", BF16),
    "icepop": ("bf16", [*BF16, "--tis_cap", "5", "--tis_floor", "0.5",
                        "--tis_form", "token_mask"]),
    "mis": ("bf16", [*BF16, "--tis_cap", "3", "--tis_form", "sequence_mask"]),
}  # fmt: skip
CURVE = "rewards/correctness"
LAST = 3  # steps whose sampled completions are taken together
BLUE, GREY = "#2563eb", "#64748b"


def run(folder, flags):
    """A run of main.py in `folder`, unless one with these flags has ended there."""
    said, asked = folder.with_suffix(".flags"), " ".join(map(str, flags))
    ended = (folder / "report.html").exists()
    if ended and said.exists() and said.read_text() != asked:
        sys.exit(f"{folder}: ended with other flags, {said}; name another --output_dir")
    if not ended:
        shutil.rmtree(folder, ignore_errors=True)  # one that was stopped
        folder.parent.mkdir(parents=True, exist_ok=True)
        said.write_text(asked)
        with folder.with_suffix(".log").open("w") as log:
            done = subprocess.run(
                [sys.executable, ROOT / "main.py", *map(str, flags), "--output_dir", folder],
                stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )  # fmt: skip
        if done.returncode:
            sys.exit(f"{folder.with_suffix('.log')}: main.py ended with status {done.returncode}")
    return folder


def run_of(asked, seed, name):
    """The run of an objective with a seed. Of its files those are kept that are small."""
    flags = ["--preset", "cpu", "--questions_per_step", 8, "--kl_beta", 0,
             "--learning_rate", 1.5e-5, "--model_name", asked.model_name, "--seed", seed,
             "--short_eval_iterations", 0]  # fmt: skip
    flags += asked.flags.split()
    start = run(asked.output_dir / f"start_{seed}",
                [*flags, "--num_train_iters", 0, "--eval_problems", 1])  # fmt: skip
    folder = run(asked.output_dir / f"{name}_{seed}", [
        *flags, "--model_name", start / "model", "--cold_start_steps", 0,
        "--num_train_iters", asked.steps, "--eval_problems", asked.eval_problems,
        *OBJECTIVES[name][1],
    ])  # fmt: skip
    for large in ("model", "checkpoints"):
        shutil.rmtree(folder / large, ignore_errors=True)
    return folder


def answers(folder):
    """Whether each held-out answer at the end is right, in the order of the questions."""
    last = max((folder / "completions").glob("eval_*.jsonl"))
    rows = sorted(read_rows(last), key=lambda row: (row["question"], row["answer"]))
    return [row["correct"] for row in rows]


def row_of(name, runs, compared):
    """A line of the table. runs, compared: folders of the same seeds, one by one."""
    means = Mean(name, [Series(folder) for folder in runs])
    accuracy, (low, high) = means.evaluations["accuracy"][1][-1], means.intervals["accuracy"]
    sampled = means.metrics[CURVE][1][-LAST:]
    cells = [f"{sum(sampled) / len(sampled) / 2:.0%}", f"{means.metrics['entropy'][1][-1]:.2f}",
             f"{means.metrics['flat_groups'][1][-1]:.0%}",
             f"{accuracy:.1%} ({low[-1]:.1%}–{high[-1]:.1%})"]  # fmt: skip
    if not compared:
        return [name, *cells, ""]
    before, after = ([right for folder in side for right in answers(folder)]
                     for side in (compared, runs))  # fmt: skip
    change = "{:+.1f} [{:+.1f}, {:+.1f}]".format(
        *(100 * value for value in paired_difference(before, after))
    )
    return [name, *cells, change]


def draw(path, found):
    """A panel for each objective: its mean and range over seeds, and in grey that of the other over
    the same seeds."""
    shown = [name for name in found if OBJECTIVES[name][0] in found]
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.5 * rows), layout="constrained", dpi=110)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True, sharex=True).ravel()
    for place, (axes, name) in enumerate(zip(panels, shown)):
        other = OBJECTIVES[name][0]
        seeds = [seed for seed in found[name] if seed in found[other]]
        for each, colour in ((other, GREY), (name, BLUE)):
            means = Mean(each, [Series(found[each][seed]) for seed in seeds])
            steps, values = means.metrics[CURVE]
            low, high = means.metric_ranges[CURVE]
            axes.fill_between(steps, *([value / 2 for value in side] for side in (low, high)),
                              color=colour, alpha=0.15, linewidth=0)  # fmt: skip
            axes.plot(steps, [value / 2 for value in values], color=colour, linewidth=2, label=each)
        several = f", {len(seeds)} seeds" if len(seeds) > 1 else ""
        axes.set_title(f"{name}{several}", loc="left", fontweight="bold", fontsize=10)
        axes.tick_params(labelbottom=place + columns >= len(shown))  # the last one of its column
        axes.legend(frameon=False, fontsize=8, loc="lower right")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    figure.supxlabel("step", fontsize=10)
    figure.supylabel("sampled completions that are right", fontsize=10)
    figure.savefig(path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[7111994, 1, 2])
    parser.add_argument("--only", nargs="+", choices=OBJECTIVES, default=[*OBJECTIVES])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--eval_problems", type=int, default=128)
    parser.add_argument("--model_name", default="smollm2-135m")
    parser.add_argument("--flags", default="", help="further flags of main.py, for all runs")
    asked = parser.parse_args(argv)
    found = {}
    for seed in asked.seeds:
        for name in asked.only:
            found.setdefault(name, {})[seed] = run_of(asked, seed, name)
            print(f"seed {seed}: {name} ended", flush=True)
    head = ("", f"right, last {LAST} steps' samples", "entropy", "flat groups",
            f"held-out after {asked.steps} steps (range)", "against", "points")  # fmt: skip
    rows = []
    for name, runs in found.items():
        other = OBJECTIVES[name][0] if OBJECTIVES[name][0] in found else None
        *cells, change = row_of(name, [*runs.values()], [*found[other].values()] if other else None)
        rows.append([*cells, other or "", change])
    print(table([head, *rows]))
    if len(found) > 1:
        draw(asked.output_dir / "objectives.png", found)


if __name__ == "__main__":
    main()
