"""What a run of self-play shows of its game: every position's moves, and games move by move.

Made from completions/games_XXXXX.jsonl alone, of the first evaluation and of the last.
"""

import html
import re

from records.files import read_rows

FEW_MOVES = 2  # at most: then the second move's probability says all there is to know


def first_and_last(path):
    """[(step, records)] of a run's first and last evaluation; none where it plays no game."""
    files = sorted((path / "completions").glob("games_*.jsonl"))
    ends = dict.fromkeys([*files[:1], *files[-1:]])
    return [(int(file.stem.partition("_")[2]), read_rows(file)) for file in ends]


def bars(records):
    """[(position, its probability, that of perfect play or None)] of what is drawn of the moves:
    the second of two, to bet or to call say; of more, those that are best, where some are not."""
    rows = [record for record in records if "position" in record]
    rows.sort(key=lambda row: _in_order(row["position"]))
    if all(len(row["moves"]) <= FEW_MOVES for row in rows):
        return [(row["position"], *_second(row)) for row in rows]
    decisive = [row for row in rows if row["perfect"] and 0 in row["perfect"].values()]
    return [
        (row["position"], sum(p for move, p in row["moves"].items() if row["perfect"][move]), 1.0)
        for row in decisive
    ]


def _in_order(text):
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]


def _second(row):
    move = [*row["moves"]][-1]
    return row["moves"][move], row["perfect"][move] if row["perfect"] else None


def draw_moves(axes, ends):
    """Bars side by side, one for each of the evaluations `ends`, and a line at perfect play."""
    names = [name for name, *_ in bars(ends[0][1])]
    width = 0.8 / len(ends)
    for place, (step, records) in enumerate(ends):
        shares = {name: share for name, share, _ in bars(records)}
        offsets = [n + (place - (len(ends) - 1) / 2) * width for n in range(len(names))]
        colour = ("#94a3b8", "#2563eb")[place + 2 - len(ends)]
        heights = [shares.get(name, 0) for name in names]
        axes.bar(offsets, heights, width, color=colour, label=f"step {step}")
    for n, (_, _, perfect) in enumerate(bars(ends[0][1])):
        if perfect is not None:
            label = "perfect play" if n == 0 else None
            axes.hlines(perfect, n - 0.45, n + 0.45, color="#dc2626", linewidth=2, label=label)
    # A game's texts are text, two $ in them no formula.
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=7, parse_math=False)
    axes.set_ylim(0, 1.05)
    rows = [record for record in ends[0][1] if "position" in record]
    few = all(len(row["moves"]) <= FEW_MOVES for row in rows)
    drawn = [*dict.fromkeys([*row["moves"]][-1] for row in rows)]  # there may be one for each card
    drawn = [*drawn[:FEW_MOVES], *["..."] * (len(drawn) > FEW_MOVES)]
    said = " / ".join(drawn) if few else "a best move"
    axes.set_title(f"probability of: {said}", parse_math=False)
    axes.set_ylabel("probability")
    axes.legend(frameon=False, fontsize=8)


def games_section(path):
    """The same games before and after as markup, deal by deal; "" where there are none."""
    ends = first_and_last(path)
    columns = [
        (step, [record for record in records if "turns" in record]) for step, records in ends
    ]
    if not columns:
        return ""
    parts = []
    for n, game in enumerate(columns[0][1]):
        cells = []
        for step, games in columns:
            if n < len(games):
                cells.append(f"<div><h4>step {step}</h4>{_game(games[n])}</div>")
        parts.append(f"<h3>against {html.escape(game['against'])} play, game {n + 1}</h3>"
                     f'<div style="display:flex;gap:2em">{"".join(cells)}</div>')  # fmt: skip
    return f"<details><summary>{len(columns[0][1])} games</summary>{''.join(parts)}</details>"


def _game(game):
    turns = (
        f"<li><b>{html.escape(turn['player'])}</b>: {html.escape(turn['told'])} "
        f"<i>{html.escape(turn['said'])}</i></li>"
        for turn in game["turns"]
    )
    end = f"the policy has {game['won']:+g}" + ("" if game["legal"] else ", by an illegal move")
    return f"<ol>{''.join(turns)}</ol><p>{html.escape(end)}</p>"
