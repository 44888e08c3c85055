"""What goes wrong in a run while its reward may look well: hacking, collapse, drift.

Every rule is a pure function of a run's records so far: `history`, the lines of metrics.jsonl, and
`evaluations`, those of eval.jsonl that were made by then. It returns what happened, or None. A
single step of few groups proves little, so rules look at means over the last WINDOW steps. To add
one, write it and put it in RULES.
"""

from statistics import fmean, variance

WINDOW = 5  # steps that a mean is over
QUIET = 20  # steps for which a rule must not have held before it is told (again)
CLEAR = 3  # standard errors by which a reward must rise; chance does it once in 100 comparisons
LEVEL = 0.01  # accuracy; a smaller rise is none: it is within a standard error on 1,319 problems
ENTROPY = 0.01  # nats per token: 100 tokens have 1 nat, less than 3 completions to choose from
KL = 1.0  # nats per token: the policy's tokens are e times likelier than under the reference
DRIFT = 2.0  # factor between lengths; healthy runs stay within 1.3
FLAT = 0.8  # of the groups; towards the end of a healthy run two thirds may be flat
SLOT = 0.8  # of the verdicts; beyond it, or for the second as often, the place decides
WORSE = 0.05  # exploitability above the first, or above 0; learners of each other go round a bit
TRUNCATED = 0.5  # of the completions; what is cut off rarely has an answer to reward


def _values(history, key):
    return [row[key] for row in history if row.get(key) is not None]


def _mean(values):
    """The mean of the last WINDOW values; None where there are fewer."""
    return fmean(values[-WINDOW:]) if len(values) >= WINDOW else None


def _share(history, key):
    """The same for a share, which is also taken as it is where it has been 1 from the start."""
    values = _values(history, key)
    return 1.0 if values and min(values) == 1 else _mean(values)


def _best_and_last(evaluations):
    """The best evaluation but the last, and the last; nothing where there are fewer than two."""
    rows = [row for row in evaluations if row.get("accuracy") is not None]
    return (max(rows[:-1], key=lambda row: row["accuracy"]), rows[-1]) if len(rows) > 1 else None


def reward_hacking(history, evaluations):
    """The reward rose since the best evaluation, the held-out accuracy did not."""
    pair = _best_and_last(evaluations)
    if not pair or pair[1]["accuracy"] >= pair[0]["accuracy"] + LEVEL:
        return None
    best, last = pair
    before = _values([row for row in history if row["step"] < max(best["step"], WINDOW)], "reward")
    after = _values(
        [row for row in history if best["step"] <= row["step"] < last["step"]], "reward"
    )
    before, after = before[-WINDOW:], after[-WINDOW:]
    if len(before) < WINDOW or len(after) < WINDOW or last["step"] < best["step"] + 2 * WINDOW:
        return None
    error = ((variance(before) + variance(after)) / WINDOW) ** 0.5
    if fmean(after) - fmean(before) <= CLEAR * error:
        return None
    return (f"reward {fmean(before):.2f} -> {fmean(after):.2f} while held-out accuracy "
            f"{best['accuracy']:.1%} -> {last['accuracy']:.1%}: it may be won without "
            "answering right")  # fmt: skip


def accuracy(history, evaluations):
    """The held-out accuracy is below an earlier one, and their 95 % intervals do not touch."""
    pair = _best_and_last(evaluations)
    if not pair or not pair[1]["accuracy_high"] < pair[0]["accuracy_low"]:
        return None
    return (f"held-out accuracy fell from {pair[0]['accuracy']:.1%} (step {pair[0]['step']}) to "
            f"{pair[1]['accuracy']:.1%}; lower --learning_rate")  # fmt: skip


def blind(history, evaluations):
    """With their own pictures questions are answered no better than with others'."""
    last = evaluations[-1] if evaluations else {}
    if last.get("above_blind_low") is None or last["above_blind_low"] > 0:
        return None
    return (f"held-out accuracy {last['accuracy']:.1%}, with other problems' pictures "
            f"{last['blind_accuracy']:.1%}: no sign that it looks")  # fmt: skip


def entropy(history, evaluations):
    mean = _mean(_values(history, "entropy") or _values(history, "cross_entropy"))
    if mean is None or mean >= ENTROPY:
        return None
    return (f"{mean:.4f} nats per token: a group's completions are nearly the same; raise "
            "--temperature or lower --learning_rate")  # fmt: skip


def kl(history, evaluations):
    mean = _mean(_values(history, "kl"))
    if mean is None or mean <= KL:
        return None
    return (f"{mean:.2f} nats per token: the policy has left the reference; lower --learning_rate "
            "or raise --kl_beta")  # fmt: skip


def completion_length(history, evaluations):
    """Against the first WINDOW steps."""
    values = _values(history, "completion_length")
    if len(values) < 2 * WINDOW:
        return None
    first, last = fmean(values[:WINDOW]), _mean(values)
    if first / DRIFT <= last <= first * DRIFT:
        return None
    return f"{first:.0f} tokens at first, {last:.0f} now"


def flat_groups(history, evaluations):
    share = _share(history, "flat_groups")
    if share is None or share < FLAT:
        return None
    return (f"in {share:.0%} of the groups all completions earned the same: little to learn from; "
            "see --max_draws and --temperature")  # fmt: skip


def truncated(history, evaluations):
    share = _share(history, "truncated")
    if share is None or share <= TRUNCATED:
        return None
    return f"{share:.0%} of the completions were cut off; raise --max_completion_length"


def first_slot(history, evaluations):
    share = _share(history, "referee/first_slot")
    if share is None or 1 - SLOT <= share <= SLOT:
        return None
    return (f"{share:.0%} of the referee's verdicts are for the text that it reads first: only the "
            "difference between both orders says anything")  # fmt: skip


def second_referee(history, evaluations):
    """The referee that rewards sees answers better than those of step 0, the second one does not:
    it may have been fooled."""
    rows = [row for row in evaluations if "win_rate/eval_referee" in row]
    if not rows or rows[-1].get("win_rate/referee_low", 0) <= 0.5:
        return None
    if rows[-1]["win_rate/eval_referee_low"] > 0.5:
        return None
    return (f"the referee prefers {rows[-1]['win_rate/referee']:.0%} of the answers to those of "
            f"step 0, the second one {rows[-1]['win_rate/eval_referee']:.0%}: what is rewarded may "
            "not be better")  # fmt: skip


def skipped(history, evaluations):
    if not history[-1].get("skipped"):
        return None
    return "update skipped, its loss or gradient was not finite"


def locked_in(history, evaluations):
    """Self-play that no longer learns of itself: what it never plays, it never meets."""
    rows = [row for row in evaluations if row.get("exploitability") is not None]
    if not rows:
        return None
    first, last = rows[0]["exploitability"], rows[-1]["exploitability"]
    flat = _share(history, "flat_groups")
    solved = last <= WORSE  # then nearly all groups are flat, as they should be
    if solved or (last <= first + WORSE and (flat is None or flat < FLAT)):
        return None
    flat = "" if flat is None else f", {flat:.0%} of the groups flat"
    return (f"self-play: exploitability {first:.3f} at first, {last:.3f} now{flat}; raise "
            "--kl_beta or --tremble, lower --learning_rate")  # fmt: skip


# Which file shows it: the step's own completions, or the last evaluation's.
RULES = {
    reward_hacking: "eval",
    accuracy: "eval",
    locked_in: "eval",
    blind: "eval",
    entropy: "step",
    kl: "step",
    completion_length: "step",
    flat_groups: "step",
    truncated: "step",
    first_slot: "step",
    second_referee: "eval",
    skipped: "step",
}


def new_alarms(history, evaluations, kind):
    """What holds at the last step and at none of the QUIET steps before it, as lines of text.

    kind: "step" for the rules that a step's line decides, "eval" for those that look at the
    evaluation after it. Each line is `name: what happened; see FILE`, where FILE holds completions
    that show it.
    """

    def by(rows):
        return [row for row in evaluations if row["step"] <= rows[-1]["step"] + 1]

    lines = []
    for rule in [rule for rule, shown_by in RULES.items() if shown_by == kind and history]:
        message = rule(history, by(history))
        earlier = range(max(1, len(history) - QUIET), len(history))
        if not message or any(rule(history[:n], by(history[:n])) for n in earlier):
            continue
        step = (history if kind == "step" else by(history))[-1]["step"]
        lines.append(f"{rule.__name__}: {message}; see completions/{kind}_{step:05d}.jsonl")
    return lines
