"""A run as one page: RUN/report.html, which needs no network, no server and no other file.

Made from the run's files alone, at its end or by `python main.py report RUN`. What a model or
a data set wrote is data: in the markup it is escaped, for the script it is JSON without `<`, which
shows it as text and nothing else; a content security policy lets no other script run.
"""

import base64
import hashlib
import html
import json
from pathlib import Path

from matplotlib.ticker import MaxNLocator

from records.budget import budget
from records.files import (
    LABELS,
    NO_FIGURE,
    Series,
    coinciding,
    is_share,
    read_rows,
    smooth,
    title,
    unit,
)
from records.games import games_section
from records.pairs import pairs_section
from records.resuming import REPORT
from records.thumbnails import thumbnails
from utils import replace_text

PAGE = Path(__file__).parent / "report_page.html"
FIRST_CHARTS = ("reward", "accuracy", "kl", "entropy", "completion_length", "flat_groups")
# As in overview.png: without a reference there is no KL to draw, with a filter no entropy.
IN_PLACE_OF = {"kl": "grad_norm", "entropy": "cross_entropy"}

# What keeps a page below 5 MB. The run's files hold everything.
POINTS = 400  # of a curve
EVALUATIONS = 4  # side by side
ANSWERS = 30  # questions of each kind (gained, lost, right, wrong)
CHARACTERS = 2000  # of an answer
TOKENS = 4000  # of a group

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 214, 58, 8, 8, 34  # of a chart, in its own units


def write_report(path):
    """Write the page of the run at `path`; returns its path. Raises UserError without a run."""
    run = Series(path)
    charts, chart_data = _charts(run)
    answers, groups = _answers(run), _groups(run)
    sections = [
        _headline(run, answers),
        _section("Alarms", _alarm_list(run)),
        _section("Curves", charts),
        _section("Held-out answers", '<div id="answers"></div>' if answers else ""),
        _section("Against the answers of step 0", pairs_section(run.path)),
        _section("Games", games_section(run.path)),
        _section("Token by token", '<div id="tokens"></div>' if groups else ""),
        _section("Where the time and the tokens went", _budget(run)),
        _section("Configuration", _configuration(run)),
    ]
    # Without "<" the JSON cannot end the element that holds it.
    data = {"charts": chart_data, "answers": answers, "groups": groups}
    data = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    page = PAGE.read_text(encoding="utf-8")
    script = page.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    for place, value in {
        "<!--SCRIPT-HASH-->": f"sha256-{digest}",
        "<!--TITLE-->": html.escape(f"GRPO: {run.name}"),
        "<!--DATA-->": data,
        "<!--BODY-->": "\n".join(sections),
    }.items():
        page = page.replace(place, value)
    target = run.path / REPORT
    replace_text(target, page.encode(errors="replace").decode())
    return target


def _section(title, inside):
    return f"<section><h2>{title}</h2>\n{inside}</section>" if inside else ""


def _element(tag, text, kind=""):
    opening = f'{tag} class="{kind}"' if kind else tag
    return f"<{opening}>{html.escape(str(text))}</{tag}>"


# --- what it came to ---------------------------------------------------------------------------


def _headline(run, answers):
    """Accuracy before and after, and a row of figures."""
    flags, rows = run.flags, read_rows(run.path / "eval.jsonl")
    about = [flags.get("model_name"), flags.get("dataset_name"), run.name]
    parts = [_element("p", " · ".join(str(part) for part in about if part), "about")]
    if rows:
        ends = [rows[0], rows[-1]][: len(rows)]
        shown = [f"{row['accuracy']:.1%}" for row in ends]
        parts.append(f"<h1>Held-out accuracy {' → '.join(shown)}</h1>")
        intervals = " → ".join(
            f"[{row['accuracy_low']:.1%}, {row['accuracy_high']:.1%}]" for row in ends
        )
        steps = " → ".join(str(row["step"]) for row in ends)
        facts = [f"{rows[0]['problems']} questions, greedy", f"95 % intervals {intervals}",
                 f"after {steps} steps"]  # fmt: skip
        if len(rows) > 1 and answers:
            facts.append(f"{answers['counts']['gained']} gained, {answers['counts']['lost']} lost")
        if len(rows) > 1 and rows[-1].get("mcnemar_p") is not None:
            facts.append(f"p = {rows[-1]['mcnemar_p']:.2g} (McNemar)")
        if "lenient_accuracy" in rows[0]:
            lenient = " → ".join(f"{row['lenient_accuracy']:.1%}" for row in ends)
            facts.append(f"tags not needed: {lenient}")
        parts.append(_element("p", " · ".join(facts), "facts"))
    else:
        parts.append("<h1>Not evaluated yet</h1>")
    return f"<header>{''.join(parts)}</header>"


def _alarm_list(run):
    if not run.alarms:
        return '<p class="quiet">None was raised.</p>'
    lines = (_element("li", f"step {step}: {line}") for step, line in run.alarms)
    return f'<ul class="alarms">{"".join(lines)}</ul>'


def _budget(run):
    """Two bars of shares: seconds by stage, tokens by whether they carried gradient."""
    seconds, tokens, completions = budget([*run.rows, *run.evaluation_rows, *run.short_rows])
    parts, total = [], sum(seconds.values())
    if total:
        shares = {stage: spent / total for stage, spent in seconds.items()}
        parts.append(_element("h3", f"{total:,.0f} seconds, {len(run.rows)} steps"))
        parts.append(_bar(shares))
    sampled = tokens.get("sampled")
    if sampled:
        trained = tokens["trained"] / sampled
        parts.append(_element("h3", f"{sampled:,} tokens sampled"))
        parts.append(_bar({"carried gradient": trained, "did not": 1 - trained}))
        facts = [
            f"{completions['trained']:,} of {completions['sampled']:,} completions carried "
            f"gradient",
            f"{tokens['flat'] / sampled:.0%} of the tokens in groups whose rewards are all equal",
            f"{tokens['truncated'] / sampled:.0%} in completions that were cut off",
            f"padding in training passes: {tokens['padded'] / sampled:.0%} on top",
            *(
                [f"{tokens['distinct'] / sampled:.0%} distinct, each computed once"]
                if "distinct" in tokens
                else []
            ),
        ]
        parts.append(_element("p", "; ".join(facts) + ".", "quiet"))
    return "".join(parts)


def _bar(shares):
    shown = [(name, share) for name, share in shares.items() if share > 0]
    blocks = "".join(
        f'<i class="b{i}" style="width:{share:.2%}"></i>' for i, (_, share) in enumerate(shown)
    )
    keys = "".join(
        f'<li><i class="b{i}"></i>{html.escape(name)} {share:.1%}</li>'
        for i, (name, share) in enumerate(shown)
    )
    return f'<div class="bar">{blocks}</div><ul class="legend">{keys}</ul>'


def _configuration(run):
    config = run.config
    facts = {
        "command": config.get("command"),
        "commit": config.get("commit"),
        "started": config.get("started"),
        "device": config.get("device"),
        "python": config.get("python"),
        "packages": " · ".join(f"{k} {v}" for k, v in config.get("packages", {}).items()),
        "training questions": config.get("train_problems"),
        "held-out questions": config.get("test_problems"),
    }
    known = {name: value for name, value in facts.items() if value is not None}
    flags = {f"--{name}": value for name, value in run.flags.items()}
    return (f"{_pairs(known, 'pairs')}<details><summary>All {len(flags)} flags</summary>"
            f"{_pairs(flags, 'flags')}</details>")  # fmt: skip


def _pairs(values, kind):
    rows = "".join(
        f"<div>{_element('dt', name)}{_element('dd', value)}</div>"
        for name, value in values.items()
    )
    return f'<dl class="{kind}">{rows}</dl>'


# --- curves ------------------------------------------------------------------------------------


def _charts(run):
    """(markup, data for the script): the first charts, and everything else folded away."""
    figures, held_out = {}, {}
    for key, series in run.metrics.items():
        figures.setdefault("reward" if key.startswith("rewards/") else key, {})[key] = series
    if "reward" in figures:
        figures["reward"] = _joined(figures["reward"])
    for key, series in run.evaluations.items():
        if not key.endswith(NO_FIGURE):
            name = key if LABELS.get(key, "").startswith("held-out") else f"held-out {key}"
            short = run.short_accuracy if key == "accuracy" else {}
            figures[name] = held_out[name] = {key: series, **short}
    charts = [key if key in figures else IN_PLACE_OF.get(key, key) for key in FIRST_CHARTS]
    data, first, more = [], [], []
    for name in sorted(figures, key=lambda t: [*charts, t].index(t)):
        share = is_share(name.removeprefix("held-out "))
        markup = _chart(run, name, figures[name], share, name in held_out, len(data))
        (first if name in charts else more).append(markup)
        data.append({
            "share": share,
            "left": _limits(_steps(figures[name]))[0],
            "right": _limits(_steps(figures[name]))[1],
            "series": [
                {"name": curve_name(key), "steps": steps, "values": values}
                for key, (steps, values) in _thinned(figures[name]).items()
            ],
        })  # fmt: skip
    folded = f"<details><summary>{len(more)} more</summary><div class=charts>{''.join(more)}</div>"
    return f"<div class=charts>{''.join(first)}</div>{folded}</details>", data


def _joined(figure):
    """Curves that run on top of each other as one, their mean, with all their names."""
    joined = {}
    for keys in coinciding(figure):
        columns = zip(*(figure[key][1] for key in keys))
        values = [sum(column) / len(column) for column in columns]
        joined[", ".join(map(curve_name, keys))] = figure[keys[0]][0], values
    return joined


def curve_name(key):
    return "total" if key == "reward" else key.removeprefix("rewards/")


def _thinned(figure):
    """At most POINTS points of each curve, among them the last."""

    def thin(values):
        every = -(-len(values) // POINTS)
        return values[::-1][::every][::-1]

    return {name: (thin(steps), thin(values)) for name, (steps, values) in figure.items()}


def _steps(figure):
    return [step for steps, _ in figure.values() for step in steps]


def _limits(values):
    """The range of an axis, never of width 0."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _chart(run, key, figure, share, held_out, number):
    """One SVG with ticks and alarms. A metric is a faint line and its moving average, a held-out
    figure has points, with their intervals where there are such."""
    errors = {}
    for name in figure if held_out else ():
        lows, highs = (run.evaluations.get(f"{name}_{end}", ([], [])) for end in ("low", "high"))
        errors = dict(zip(lows[0], zip(lows[1], highs[1])))
    left, right = _limits(_steps(figure))
    values = [value for _, values in figure.values() for value in values]
    values += [bound for pair in errors.values() for bound in pair]
    limits = (0, 1) if share and min(values) == max(values) else _limits(values)
    ticks = MaxNLocator(4).tick_values(*limits).tolist()

    def x(step):
        return LEFT + (step - left) / (right - left) * (WIDTH - LEFT - RIGHT)

    def y(value):
        height = HEIGHT - TOP - BOTTOM
        return TOP + (1 - (value - ticks[0]) / (ticks[-1] - ticks[0])) * height

    def path(steps, values, kind):
        points = " L".join(f"{x(s):.1f} {y(v):.1f}" for s, v in zip(steps, values))
        return f'<path class="{kind}" d="M{points}"/>'

    marks, names = [], []
    for tick in ticks:
        label = f"{tick:.0%}" if share else f"{tick:.4g}"
        marks.append(f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}"/>'
                     f'<text x="{LEFT - 5}" y="{y(tick) + 3:.1f}" text-anchor="end">{label}</text>'
                     )  # fmt: skip
    for tick in MaxNLocator(5, integer=True).tick_values(left, right):
        if left <= tick <= right and tick % 1 == 0:
            marks.append(f'<text x="{x(tick):.1f}" y="{HEIGHT - 17}" text-anchor="middle">'
                         f"{tick:.0f}</text>")  # fmt: skip
    for step in sorted({step for step, _ in run.alarms if left <= step <= right}):
        marks.append(f'<path class="alarm" d="M{x(step):.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
    for i, (name, (steps, values)) in enumerate(figure.items()):
        smoothed = _thinned({name: (steps, smooth(values))})[name]
        steps, values = _thinned({name: (steps, values)})[name]
        if held_out or len(values) == 1:
            marks.append(path(steps, values, f"line s{i % 8}"))
            marks += [f'<circle class="f{i % 8}" cx="{x(s):.1f}" cy="{y(v):.1f}" r="3"/>'
                      for s, v in zip(steps, values)]  # fmt: skip
        else:
            marks.append(path(steps, values, f"raw s{i % 8}"))
            marks.append(path(*smoothed, f"line s{i % 8}"))
        names.append(f'<li><i class="b{i % 8}"></i>{html.escape(name)}</li>')
    marks += [f'<path class="line s0" d="M{x(s):.1f} {y(low):.1f}V{y(high):.1f}"/>'
              for s, (low, high) in errors.items()]  # fmt: skip
    plain = key.removeprefix("held-out ")
    middle = (HEIGHT - BOTTOM + TOP) / 2
    marks.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 3}" text-anchor="middle">'
                 f'step</text><text transform="translate(9 {middle}) rotate(-90)" '
                 f'text-anchor="middle">{html.escape(unit(plain))}</text>')  # fmt: skip
    name = html.escape(title(plain, held_out))
    legend = f'<ul class="legend">{"".join(names)}</ul>' if len(names) > 1 else ""
    return (
        f'<figure><figcaption>{name}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" tabindex="0" '
        f'data-chart="{number}" role="img" aria-label="{name}">{"".join(marks)}</svg>{legend}'
        "</figure>"
    )


# --- what the model wrote ----------------------------------------------------------------------


def _answers(run):
    """The same held-out questions at several evaluations, a few of each kind; None without any."""
    files = sorted((run.path / "completions").glob("eval_*.jsonl"))
    if not files:
        return None
    last = len(files) - 1
    count = min(EVALUATIONS, len(files))
    picked = [files[round(i * last / max(1, count - 1))] for i in range(count)]
    questions, counts = [], dict.fromkeys(("gained", "lost", "right", "wrong"), 0)
    for records in zip(*map(read_rows, picked)):
        before, after = records[0]["correct"], records[-1]["correct"]
        kind = {(False, True): "gained", (True, False): "lost", (True, True): "right",
                (False, False): "wrong"}[before, after]  # fmt: skip
        counts[kind] += 1
        if counts[kind] <= ANSWERS:
            questions.append({
                "kind": kind,
                "question": records[0]["question"],
                "answer": records[0]["answer"],
                "images": thumbnails(run.path, records[0]),
                "answers": [_answer(record) for record in records],
            })  # fmt: skip
    steps = [int(file.stem.split("_")[1]) for file in picked]
    return {"steps": steps, "counts": counts, "questions": questions}


def _answer(record):
    text = record["completion"]
    return {
        "text": text[:CHARACTERS],
        "cut": len(text) > CHARACTERS,
        "parsed": record["parsed"],
        "correct": record["correct"],
        "lenient": record.get("lenient_correct", record["correct"]),
        "finished": record["finished"],
    }


def _groups(run):
    """The groups whose tokens were kept, the best completion first; None without any."""
    groups = []
    for file in sorted((run.path / "completions").glob("tokens_*.jsonl")):
        rows = read_rows(file.with_name(file.name.replace("tokens", "step")))
        pairs = [(rows[record["row"]], record) for record in read_rows(file)]
        pairs.sort(key=lambda pair: -pair[0]["advantage"])
        lengths, left = [0] * len(pairs), TOKENS
        # From both ends inwards: what there is no room for is in the middle.
        for i in sorted(range(len(pairs)), key=lambda i: min(i, len(pairs) - 1 - i)):
            lengths[i] = min(left, len(pairs[i][1]["tokens"]))
            left -= lengths[i]
        groups.append({
            "step": int(file.stem.split("_")[1]),
            "question": pairs[0][0]["question"],
            "answer": pairs[0][0]["answer"],
            "images": thumbnails(run.path, pairs[0][0]),
            "completions": [
                {
                    **{key: row[key] for key in ("reward", "rewards", "advantage")},
                    "left_out": len(record["tokens"]) - length,
                    "tokens": record["tokens"][:length],
                    "told": record.get("told", [])[:length],
                    "before": record["logprobs_before"][:length],
                    "after": record["logprobs_after"][:length],
                    "reference": record.get("ref_logprobs", [])[:length],
                }
                for (row, record), length in zip(pairs, lengths)
            ],
        })  # fmt: skip
    return groups or None
