"""Where a run's seconds and tokens went, and how many of them moved the policy.

Tokens are completion tokens, counted once however many inner epochs they are trained for. A token
carries gradient where its completion is in the loss and has an advantage, or, with a KL term, is in
the loss at all.
"""

from statistics import fmean

import numpy as np
from tqdm import tqdm

from grpo import completion_lengths, has_signal
from rldatasets import Transcript
from training.progress import progress
from training.tree import prefix_numbers

FEW = 16  # answers of an evaluation that say nothing of a step's time; a game has no more
STAGES = ("sampling", "rewards", "reference", "policy", "evaluation", "token_log")


def sampled_counts(rollouts, rewards):
    """What a step sampled, from its Rollouts and total rewards (Q, G), as metrics.

    tokens/distinct: prefixes, see training/tree.py. tokens/flat: in groups whose rewards are all
    equal. tokens/truncated: in completions that were cut off. Of episodes also tokens/told, what
    the world said, and turns, the policy's per completion.
    """
    mask = rollouts.completion_mask.cpu()  # (Q, G, C)
    sampled, lengths = mask.sum(-1), completion_lengths(mask)  # (Q, G) each
    ids, question = rollouts.completion_ids.flatten(0, 1).cpu(), np.indices(lengths.shape)[0]
    prefixes = prefix_numbers(ids, lengths.flatten(), question.ravel())
    counts = {
        "tokens/sampled": int(sampled.sum()),
        "tokens/distinct": len(np.unique(prefixes[mask.flatten(0, 1).numpy()])),
        "tokens/flat": int(sampled[~has_signal(rewards.cpu())].sum()),
        "tokens/truncated": int(sampled[~rollouts.finished.cpu()].sum()),
        "completions/sampled": lengths.numel(),
    }
    texts = [text for texts in rollouts.texts for text in texts]
    if any(isinstance(text, Transcript) for text in texts):
        counts["tokens/told"] = int((lengths - sampled).sum())
        counts["turns"] = fmean(len(text.turns[::2]) for text in texts)
    return counts


def say_how_long(args, first):
    """Before the first step, say about how long the run takes; nothing where there is nothing to
    go by."""
    if line := how_long(args, args.num_train_iters - first, progress.past):
        tqdm.write(line)


def how_long(args, steps, past):
    """About how long so many steps and the evaluations to come take, in a line that says what this
    rests on; None where that is not known.

    past: see utils.Progress. A step's samples are taken to come as fast as the first evaluation's
    answers and to be as long, its update to read tokens as fast as the cold start did. Completions
    that are equal so far are computed once, so that it mostly takes less; in a game, whose moves
    are mostly equal, so much less that nothing is said.
    """
    evaluation, answers = past.get("evaluation", (0, {}))
    cold, read = past.get("cold start", (0, {}))
    known = answers.get("answers", 0) > FEW and answers.get("tokens") and read.get("tokens")
    if not (steps and known):
        return None
    completions = args.questions_per_step * args.group_size
    length = answers["tokens"] / answers["answers"]
    of_cold_start = read["tokens"] / (read["steps"] * args.questions_per_step)
    tokens = completions * length + args.questions_per_step * max(0, of_cold_start - length)
    step = completions * evaluation / answers["answers"]
    step += args.num_inner_epochs * tokens * cold / read["tokens"]
    evaluations = 1 + ((steps - 1) // args.eval_iterations if args.eval_iterations else 0)
    if args.short_eval_iterations:  # of an eighth
        evaluations += (steps - 1) // args.short_eval_iterations / 8
    return (
        f"about {in_words(steps * step + evaluations * evaluation)} for {steps} "
        f"step{'s' * (steps != 1)}: if sampling is as fast as the first evaluation was, an update "
        "as the cold start"
    )


def in_words(seconds):
    """A time to plan with, e.g. 40 s, 12 min, 3.1 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


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
