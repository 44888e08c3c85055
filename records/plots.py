"""A run's files in, PNGs out: `python main.py plot RUN [RUN ...]`.

Draws from config.json, metrics.jsonl and eval.jsonl alone, so a run can be plotted while it goes
on, after it died, or beside others. Whatever is in metrics.jsonl gets a figure: a new reward
function or metric needs no change here.
"""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from records.files import (
    BEFORE_COLD_START,
    NO_FIGURE,
    Mean,
    Series,
    coinciding,
    is_share,
    smooth,
    title,
    unit,
)
from records.games import bars, draw_moves, first_and_last

BUDGET = ("seconds/", "tokens/", "completions/")
COLOURS = ["#2563eb", "#ea580c", "#16a34a", "#9333ea", "#dc2626", "#0891b2", "#a16207", "#64748b"]
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "grid.alpha": 0.25, "font.size": 10, "axes.titleweight": "bold",
         "axes.titlelocation": "left", "figure.facecolor": "white"}  # fmt: skip


def _line(axes, steps, values, colour, label=None, band=None):
    """The raw line, faint, and its moving average; or, with a band around it, the raw line."""
    marker = "o" if len(values) == 1 else None
    if band:
        axes.fill_between(steps, *band, color=colour, alpha=0.15, linewidth=0)
    else:
        axes.plot(steps, values, color=colour, alpha=0.3, linewidth=1)
        values = smooth(values)
    axes.plot(steps, values, color=colour, linewidth=2, marker=marker, label=label)


def _metric(axes, runs, key):
    for run, colour in zip(runs, COLOURS * len(runs)):
        if key in run.metrics:
            _line(axes, *run.metrics[key], colour, run.name, run.metric_ranges.get(key))
    _finish(axes, runs, key, legend=len(runs) > 1)


def _evaluation(axes, runs, key):
    """A held-out figure over steps, with its interval where it has one."""
    apart = [0.012 * (place - (len(runs) - 1) / 2) for place in range(len(runs))]
    for run, colour, aside in zip(runs, COLOURS * len(runs), apart):
        if key not in run.evaluations:
            continue
        steps, values = run.evaluations[key]
        steps = [step + aside * (max(steps) or 1) for step in steps]  # lest intervals hide others
        name = run.name if len(runs) > 1 else "on all problems"
        axes.plot(steps, values, "o:", color=colour, linewidth=1.2, markersize=7, label=name)
        for name, series in run.short_accuracy.items() if key == "accuracy" else ():
            kind = "x" if name == BEFORE_COLD_START else ".-"
            axes.plot(*series, kind, color=colour, alpha=0.6, linewidth=1, label=name)
        if key in run.intervals:
            low, high = run.intervals[key]
            below = [value - bound for value, bound in zip(values, low)]
            above = [bound - value for value, bound in zip(values, high)]
            axes.errorbar(steps, values, [below, above], color=colour, capsize=4, fmt="none")
    short = key == "accuracy" and any(run.short_accuracy for run in runs)
    _finish(axes, runs, key, legend=len(runs) > 1 or short)


def _rewards(axes, runs):
    """One run: the total reward and every function's share. Several: each run's total."""
    if len(runs) > 1:
        return _metric(axes, runs, "reward")
    metrics = runs[0].metrics
    curves = {key: metrics[key] for key in metrics if key == "reward" or key.startswith("rewards/")}
    groups = coinciding(curves)
    for keys, colour in zip(groups, COLOURS * len(groups)):
        steps, values = metrics[keys[0]]
        band = runs[0].metric_ranges.get(keys[0])
        if len(keys) > 1:
            columns = list(zip(*(metrics[key][1] for key in keys)))
            values = [sum(column) / len(column) for column in columns]
            axes.fill_between(
                steps, [*map(min, columns)], [*map(max, columns)], color=colour, alpha=0.3
            )
        _line(axes, steps, values, colour, ", ".join(map(reward_name, keys)), band)
    _finish(axes, runs, "reward", legend=True)


def reward_name(key):
    return "total" if key == "reward" else key.removeprefix("rewards/")


def _seconds(axes, runs):
    """One run: seconds per step, stacked by stage. Several: each run's total."""
    if len(runs) > 1:
        for run, colour in zip(runs, COLOURS * len(runs)):
            totals = {}
            for key, (steps, values) in run.metrics.items():
                for step, value in zip(steps, values):
                    if key.startswith("seconds/"):
                        totals[step] = totals.get(step, 0) + value
            if totals:
                _line(axes, list(totals), list(totals.values()), colour, run.name)
        return _finish(axes, runs, "seconds", legend=True)
    metrics = runs[0].metrics
    stages = {key.split("/")[1]: metrics[key] for key in metrics if key.startswith("seconds/")}
    _stack(axes, stages)
    _finish(axes, runs, "seconds", legend=False)
    _legend_above(axes)


def _stack(axes, parts):
    """Each of {name: (steps, values)} on top of those before it, a step in width, and 0 where it
    has no value. One shape for all steps: thousands of bars would take minutes to draw."""
    steps = sorted({step for steps, _ in parts.values() for step in steps})
    edges = [step - 0.5 for step in steps] + [step + 0.5 for step in steps[-1:]]
    below = [0] * len(steps)
    for (name, series), colour in zip(parts.items(), COLOURS * len(parts)):
        known = dict(zip(*series))
        top = [low + known.get(step, 0) for step, low in zip(steps, below)]
        axes.stairs(top, edges, baseline=below, fill=True, color=colour, label=name)
        below = top


def _tokens(axes, runs):
    """Every step's sampled tokens, by whether they carried gradient, and why they may not have."""
    metrics = runs[0].metrics
    steps, sampled = metrics["tokens/sampled"]
    trained = metrics["tokens/trained"][1]
    rest = [all_of - part for all_of, part in zip(sampled, trained)]
    _stack(axes, {"carried gradient": (steps, trained), "did not": (steps, rest)})
    for key, name, line in (("flat", "in flat groups", "k--"), ("truncated", "cut off", "k:"),
                            ("distinct", "distinct", "k-")):  # fmt: skip
        if f"tokens/{key}" in metrics:  # runs of before have no count of distinct ones
            axes.plot(*metrics[f"tokens/{key}"], line, label=name)
    _finish(axes, runs, "tokens/sampled", legend=False)
    _legend_above(axes)


def _legend_above(axes):
    """A legend over what fills the panel, in room made for it."""
    if axes.get_legend_handles_labels()[0]:
        axes.set_ylim(top=1.15 * axes.get_ylim()[1])
        axes.legend(frameon=False, fontsize=8, loc="upper center", ncols=4)


def _alarms(axes, runs):
    """A dotted line at every step with an alarm; in a figure's first panel, with their names."""
    named = axes is axes.figure.axes[0]
    for run in runs:
        names = {}
        for step, line in run.alarms:
            names.setdefault(step, []).append(line.partition(":")[0])
        for step, lines in names.items():
            axes.axvline(step, color="#dc2626", linestyle=":", linewidth=1.2)
            if named:
                axes.annotate(
                    ", ".join(lines), (step, 1), xycoords=("data", "axes fraction"), rotation=90,
                    fontsize=7, color="#dc2626", ha="right", va="top", zorder=1,  # below curves
                )  # fmt: skip


def _finish(axes, runs, key, legend):
    axes.set_title(_title(runs, key))
    axes.set_xlabel("step")
    axes.set_ylabel(unit(key))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    left, right = axes.get_xlim()
    if right - left < 1:  # a single step
        axes.set_xlim(left - 0.5, right + 0.5)
    if not axes.has_data():
        axes.text(0.5, 0.5, "no steps yet", transform=axes.transAxes, ha="center", color="#64748b")
    _alarms(axes, runs)
    if is_share(key):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, framealpha=0.8, edgecolor="none")


def _title(runs, key, held_out=False):
    name = title(key, held_out)
    return name.replace("95 % interval", "range of seeds") if isinstance(runs[0], Mean) else name


def _figure(rows, columns, size):
    figure = Figure(figsize=size, layout="constrained", dpi=120)
    return figure, figure.subplots(rows, columns, squeeze=False).ravel()


def _panel():
    """A figure of one metric, and its axes. Its margins fit any: to look for the narrowest takes as
    long as to draw, for each of thirty."""
    figure = Figure(figsize=(7, 4.2), dpi=120)
    figure.subplots_adjust(left=0.12, right=0.98, bottom=0.12, top=0.88)
    return figure, figure.subplots()


def plot_runs(runs, folder):
    """Write overview.png and one PNG per metric of these `Series` into `folder`; returns it.

    Seconds, tokens and completions of a single run stand together, in budget.png.
    """
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    metric_keys = list(dict.fromkeys(key for run in runs for key in run.metrics))
    in_budget = BUDGET if len(runs) == 1 else ()
    eval_keys = list(dict.fromkeys(key for run in runs for key in run.evaluations))
    with matplotlib.rc_context(STYLE):
        figure, panels = _figure(2, 3, size=(16, 8.5))
        figure.suptitle(_headline(runs), fontsize=13)
        _rewards(panels[0], runs)
        _evaluation(panels[1], runs, "accuracy")
        # Without a reference there is no KL to draw; the gradient norm is the next thing to watch.
        _metric(panels[2], runs, "kl" if "kl" in metric_keys else "grad_norm")
        _metric(panels[3], runs, "completion_length")
        _metric(panels[4], runs, "entropy" if "entropy" in metric_keys else "cross_entropy")
        _seconds(panels[5], runs)
        figure.savefig(folder / "overview.png")
        if len(runs) == 1:
            kept = "tokens/sampled" in metric_keys  # not by runs of before there was such a count
            figure, panels = _figure(1, 1 + kept, size=(7 + 7 * kept, 4.2))
            _seconds(panels[0], runs)
            if kept:
                _tokens(panels[1], runs)
            figure.savefig(folder / "budget.png")
        for key in metric_keys:
            if key.startswith(in_budget):
                continue
            figure, axes = _panel()
            _metric(axes, runs, key)
            figure.savefig(folder / f"{key.replace('/', '_')}.png")
        for key in eval_keys:
            if not key.endswith(NO_FIGURE):
                figure, axes = _panel()
                _evaluation(axes, runs, key)
                axes.set_title(_title(runs, key, held_out=True))
                figure.savefig(folder / f"eval_{key.replace('/', '_')}.png")
        alone = len(runs) == 1 and isinstance(runs[0], Series)
        ends = first_and_last(runs[0].path) if alone else []
        if ends and bars(ends[0][1]):  # none of many moves where no move is known to be better
            figure, [axes] = _figure(1, 1, size=(9, 5.2))
            draw_moves(axes, ends)
            figure.savefig(folder / "moves.png")
    return folder


def _headline(runs):
    if len(runs) > 1:
        return "GRPO: " + " · ".join(run.name for run in runs)
    flags = runs[0].flags
    parts = [flags.get("model_name"), flags.get("dataset_name"), runs[0].name]
    return "GRPO: " + " · ".join(dict.fromkeys(str(part) for part in parts if part))


def plot_run(path):
    """Draw one run into its own plots/."""
    return plot_runs([Series(path)], Path(path) / "plots")
