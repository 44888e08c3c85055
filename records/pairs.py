"""Held-out answers beside those of step 0, with what the referees and the task say of them, as a
section of the report.

All of it is text that a model or a data set wrote: escaped, and nothing else.
"""

import html

from records.files import read_rows

SHOWN = 24  # pairs
CHARACTERS = 600  # of an answer
NAMES = {"referee": "the referee", "eval_referee": "the second referee"}


def pairs_section(path):
    """The markup of a run's last judged pairs, "" where no referee has judged any.

    Shown first are those that two judges see differently, then as many of each verdict.
    """
    files = sorted((path / "completions").glob("eval_*.jsonl"))
    if len(files) < 2:
        return ""
    before = {(row["question"], row["answer"]): row for row in read_rows(files[0])}
    rows = [
        (before[row["question"], row["answer"]], row)
        for row in read_rows(files[-1])
        if row.get("wins") and (row["question"], row["answer"]) in before
    ]
    if not rows:
        return ""
    kinds = {}
    for pair in rows:
        said = verdicts(*pair)
        kinds.setdefault(tuple(sorted(said.values())), []).append(pair)
    # Kinds with several verdicts first; then one of each in turn.
    ordered = sorted(kinds.items(), key=lambda kind: -len(set(kind[0])))
    turns = max(map(len, kinds.values()))
    chosen = [pairs[n] for n in range(turns) for _, pairs in ordered if n < len(pairs)][:SHOWN]
    step = int(files[-1].stem.split("_")[1])
    head = f"<tr><th>question</th><th>step 0</th><th>step {step}</th><th>better is</th></tr>"
    body = "".join(_row(*pair) for pair in chosen)
    note = f"{len(chosen)} of {len(rows)} pairs. The referees read both orders of each pair."
    return f'<p class="quiet">{note}</p><table class="wins">{head}{body}</table>'


def verdicts(before, after):
    """{who: "step 0", "now", "a tie" or "unread"} of a pair of records."""
    said = {NAMES.get(role, role): _verdict(chance) for role, chance in after["wins"].items()}
    gained = after["correct"] - before["correct"]
    return said | {"the exact check": {1: "now", 0: "a tie", -1: "step 0"}[gained]}


def _verdict(chance):
    if chance is None:
        return "unread"
    return "a tie" if chance == 0.5 else "now" if chance > 0.5 else "step 0"


def _row(before, after):
    said = "<br>".join(
        f"{who}: {html.escape(what)}" for who, what in verdicts(before, after).items()
    )
    texts = (after["question"], before["completion"], after["completion"])
    cells = "".join(f"<td>{html.escape(_short(text))}</td>" for text in texts)
    return f"<tr>{cells}<td>{said}</td></tr>"


def _short(text):
    return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]} ..."
