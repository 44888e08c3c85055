"""Held-out answers against the run's own answers at step 0, question by question, by referees.

The opponent is fixed: what the model wrote before GRPO, kept in completions/eval_00000.jsonl. The
referee that rewards is the one that may have been fooled; the second one, --eval_referee, never
rewarded anything.
"""

from evaluation.comparison import paired
from evaluation.referee import shares
from evaluation.significance import mcnemar_p, wilson_interval, with_interval
from rldatasets import completion_of
from sampling.rollouts import judged_text
from training.processes import everyones, from_main, own_part, summed
from training.progress import progress


def against_start(setup, first_records, summary, records):
    """(summary, records) of an evaluation with what the referees say of each answer against that of
    step 0: `wins`, {role: chance}. As they are where there is no referee or no such answer, and in
    a debate, whose sides meet each other.

    first_records(): the records of step 0, None where there are none; called in the main process.
    """
    pairs = None
    if setup.referees and not setup.task.rebut:
        first = from_main(first_records, setup.accelerator)
        pairs = paired(first, records) if first else None
    if pairs is None:
        return summary, records
    own = own_part([*zip(*pairs)], setup.accelerator)
    summary, won = dict(summary), {}
    for role, referee in setup.referees.items():
        chances = judged(referee, own, setup)
        won[role] = [chance for part in everyones(chances, setup.accelerator) for chance in part]
        summary |= win_rate(won[role], role)
        summary |= shares(summed(referee.counts(), setup.accelerator), role)
    wins = {
        id(after): {role: chances[n] for role, chances in won.items()}
        for n, (_, after) in enumerate(zip(*pairs))
    }
    return summary, [{**row, "wins": wins[id(row)]} for row in records]


def judged(referee, pairs, setup):
    """The chance that each later answer beats the earlier one: 0.5 for a tie, None unread."""
    rows = [
        (after["question"], *(referee.shown(judged_text(completion_of(one), setup))
                              for one in (after, before)))
        for before, after in pairs
    ]  # fmt: skip
    criterion = referee.task.criterion
    chances = []
    for start in range(0, len(rows), 64):
        chances += map(
            referee.scale(criterion).chance, referee.margins(rows[start : start + 64], criterion)
        )
        progress.tick(len(chances) - start, "pairs", of=len(rows))
    return chances


def win_rate(chances, role):
    """Pairs won, ties half, of those that could be read, with its 95 % interval and the exact
    two-sided sign test of the pairs that were won or lost."""
    read = [chance for chance in chances if chance is not None]
    if not read:
        return {}
    won, lost = (sum(map(test, read)) for test in (lambda c: c > 0.5, lambda c: c < 0.5))
    share = (won + (len(read) - won - lost) / 2) / len(read)
    bounds, name = wilson_interval(share * len(read), len(read)), f"win_rate/{role}"
    return with_interval(name, share, *bounds) | {f"{name}_p": mcnemar_p(won, lost)}
