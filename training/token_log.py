"""What an update did to every token of one group: completions/tokens_00012.jsonl.

Kept for three steps of a run, its first, middle and last. It costs two more forward passes over one
group, three with a reference.
"""

from grpo import completion_lengths
from training.logprobs import logprobs_without_gradient


def is_watched(step, steps):
    return step in (0, (steps - 1) // 2, steps - 1)


def watch_tokens(setup, step, rollouts, advantages):
    """Call this before an update, and what it returns after it: at a watched step that gives the
    records of the group with the largest advantages, at any other none.

    advantages: (Q, G). Before and after are both the trainer's log-probs, so that their difference
    is the update's work alone and not the sampler's rounding, which sampled_logprobs have.
    """
    if not is_watched(step, setup.args.num_train_iters):
        return list
    q = int(advantages.abs().sum(-1).argmax())

    ids, lengths = rollouts.completion_ids[q], completion_lengths(rollouts.completion_mask[q])
    pictures = rollouts.pictures and [rollouts.pictures[q]]

    def logprobs_of(model):
        with setup.stopwatch("token_log"), setup.accelerator.autocast():
            return logprobs_without_gradient(
                model, [rollouts.prompt_ids[q]], [lengths.tolist()], ids, setup.args, pictures
            )  # (G, C)

    before = logprobs_of(setup.policy)

    def records():
        logprobs = {
            "sampled_logprobs": rollouts.logprobs[q],
            "logprobs_before": before,
            "logprobs_after": logprobs_of(setup.policy),
        }
        if setup.reference is not None:
            logprobs["ref_logprobs"] = logprobs_of(setup.reference)
        return token_records(setup.tokenizer, rollouts, q, logprobs)

    return records


def token_records(tokenizer, rollouts, q, logprobs):
    """One record per completion of question q: its tokens as text and each of `logprobs`, a dict of
    (G, C). `row` is the completion's line in the step's file, counted from 0; `told` says of an
    episode's tokens which are the world's."""
    group_size = rollouts.completion_ids.shape[1]
    columns = {name: values.tolist() for name, values in logprobs.items()}
    records = []
    mask = rollouts.completion_mask[q]
    for g, length in enumerate(completion_lengths(mask).tolist()):
        ids = rollouts.completion_ids[q, g, :length].tolist()
        record = {"row": q * group_size + g, "tokens": tokenizer.batch_decode([[i] for i in ids])}
        told = (~mask[g, :length]).tolist()
        if any(told):
            record["told"] = told
        for name, values in columns.items():
            record[name] = [round(value, 5) for value in values[g][:length]]
        records.append(record)
    return records
