"""Where a run's seconds and tokens went, and how many of them moved the policy.

Tokens are completion tokens, counted once however many inner epochs they are trained for. A token
carries gradient where its completion is in the loss and has an advantage, or, with a KL term, is in
the loss at all.
"""

import numpy as np

from grpo import has_signal
from training.tree import prefix_numbers

STAGES = ("sampling", "rewards", "reference", "policy", "evaluation", "watching")


def sampled_counts(rollouts, rewards):
    """What a step sampled, from its Rollouts and total rewards (Q, G), as metrics.

    tokens/distinct: prefixes, see training/tree.py. tokens/flat: in groups whose rewards are all
    equal. tokens/truncated: in completions that were cut off.
    """
    lengths = rollouts.completion_mask.sum(-1).cpu()  # (Q, G)
    ids, question = rollouts.completion_ids.flatten(0, 1).cpu(), np.indices(lengths.shape)[0]
    prefixes = prefix_numbers(ids, lengths.flatten(), question.ravel())
    return {
        "tokens/sampled": int(lengths.sum()),
        "tokens/distinct": int(prefixes.max()) + 1,
        "tokens/flat": int(lengths[~has_signal(rewards.cpu())].sum()),
        "tokens/truncated": int(lengths[~rollouts.finished.cpu()].sum()),
        "completions/sampled": lengths.numel(),
    }


def budget(rows):
    """Sums over lines of metrics.jsonl and eval.jsonl: ({stage: seconds}, {kind: tokens},
    {kind: completions}).

    A run that kept no such count has empty dicts.
    """
    sums = {"seconds": {}, "tokens": {}, "completions": {}}
    for row in rows:
        for key, value in row.items():
            family, _, name = key.partition("/")
            if name and family in sums:
                sums[family][name] = sums[family].get(name, 0) + (value or 0)
    seconds = sums["seconds"]
    order = sorted(seconds, key=lambda s: STAGES.index(s) if s in STAGES else len(STAGES))
    return {stage: seconds[stage] for stage in order}, sums["tokens"], sums["completions"]


def budget_lines(rows):
    """The budget as a few lines of text; none without rows."""
    seconds, tokens, completions = budget(rows)
    lines, total = [], sum(seconds.values())
    if total:
        shares = [f"{stage} {spent / total:.0%}" for stage, spent in seconds.items()]
        lines.append(f"{total:.0f} s: {', '.join(shares)}")
    if tokens.get("sampled"):
        share = {kind: f"{count / tokens['sampled']:.0%}" for kind, count in tokens.items()}
        distinct = f", {share['distinct']} of them distinct" if "distinct" in share else ""
        lines.append(
            f"{tokens['sampled']} tokens sampled{distinct}: {share['trained']} carried gradient "
            f"({completions['trained']} of {completions['sampled']} completions), {share['flat']} "
            f"in flat groups, {share['truncated']} cut off; padding {share['padded']} on top"
        )
    return lines
