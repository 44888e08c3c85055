"""What the policy thinks of a completion: the log-probability of every token that was sampled.

Letters: Q questions, R completions, P prompt tokens, C completion tokens, T of them real, U of
these distinct, D hidden size, V vocabulary.
"""

import torch

from training.head import capped_, head_of
from training.lean_layers import gathered_gradient, product
from training.progress import progress
from training.sharding import gathering
from training.shared_prefix import WITHOUT_GRADIENT, hidden_before_completions, micro_batches

LOGPROB_CHUNK = 1024  # tokens whose (V,) logits exist at once; at V = 151,936 in fp32, 0.6 GB
SOFTMAX_ROWS = 128  # of these, how many are normalised at once, which needs their size once more


def log_softmax_(logits):
    """Log-softmax over the last axis, in place. logits: (N, V)."""
    for rows in logits.split(SOFTMAX_ROWS):
        rows.copy_(rows.log_softmax(-1))
    return logits


class TokenLogprobs(torch.autograd.Function):
    """log p(token) from the hidden state before it: h / temperature times the head, log-softmax.
    Beside it, where asked for, the entropy of the whole distribution, H = -sum_v p_v log p_v.

    Written out because nothing but this needs V numbers per token: here they exist for
    LOGPROB_CHUNK tokens at once, in a tensor that the backward pass overwrites, and for more
    tokens than that they are computed again there. The product is not left to bf16 autocast, here
    as in decoder.py: rounding logits near 20 to bf16 shifts a log-probability by up to 0.06, and KL
    and ratio with it.
    """

    @staticmethod
    def forward(ctx, hidden, weight, token_ids, with_entropy=False, cap=None):
        """hidden: (T, D), over the temperature, as `cap` is, which bounds the logits (see head.py;
        arXiv 2408.00118, section 2). weight: (V, D). token_ids: (T,).

        Returns (log-probs (T,), entropies (T,) in nats or None).
        """
        logprobs, entropies, kept = [], [], None
        for h, ids in zip(hidden.split(LOGPROB_CHUNK), token_ids.split(LOGPROB_CHUNK)):
            kept = None  # the last chunk's, before this one takes its own
            kept = log_softmax_(capped_(product(h, weight), cap))  # (N, V)
            logprobs.append(kept.gather(-1, ids[:, None]).squeeze(-1))
            if with_entropy:
                entropies += [
                    -torch.linalg.vecdot(rows.exp(), rows) for rows in kept.split(SOFTMAX_ROWS)
                ]
        entropy = torch.cat(entropies) if with_entropy else None
        ctx.save_for_backward(hidden, weight, token_ids, entropy)
        ctx.kept = kept if len(logprobs) == 1 and cap is None else None
        ctx.cap = cap
        return torch.cat(logprobs), entropy

    @staticmethod
    def backward(ctx, gradient, to_entropy):
        hidden, weight, token_ids, entropy = ctx.saved_tensors
        to_hidden = torch.empty_like(hidden)
        trained = ctx.needs_input_grad[1]
        to_weight, given = gathered_gradient(weight) if trained else (None, None)
        for start in range(0, len(hidden), LOGPROB_CHUNK):
            part = slice(start, start + LOGPROB_CHUNK)
            logprobs, ctx.kept = ctx.kept, None
            if logprobs is None:
                logits = capped_(product(hidden[part], weight), ctx.cap)
                slope = None if ctx.cap is None else 1 - (logits / ctx.cap).square_()  # of the cap
                logprobs = log_softmax_(logits)
            # d log p(token) / d logits = one-hot(token) - p,   d H / d logits = -p (log p + H)
            if entropy is None:
                to_logits = logprobs.exp_().mul_(-gradient[part, None])  # (N, V)
            else:
                inputs = (logprobs, *(x[part, None] for x in (entropy, to_entropy, gradient)))
                for rows, h, to_h, to_logprob in zip(*(x.split(SOFTMAX_ROWS) for x in inputs)):
                    probs = rows.exp()
                    rows.add_(h).mul_(to_h).add_(to_logprob).mul_(probs).neg_()
                to_logits = logprobs  # (N, V)
            to_logits.scatter_add_(-1, token_ids[part, None], gradient[part, None])
            if ctx.cap is not None:
                to_logits.mul_(slope)
            torch.mm(to_logits, weight, out=to_hidden[part])
            if to_weight is not None:
                to_weight.addmm_(to_logits.T, hidden[part])
            del logprobs, to_logits
        return to_hidden, given, None, None, None


def token_logprobs(model, hidden, token_ids, temperature, with_entropy=False):
    """log p(token_ids) from the hidden states before them, at the sampling temperature, in fp32 or
    finer. hidden: (T, D), token_ids: (T,). Returns (log-probs (T,), entropies (T,) of the
    distributions that they come from, None unless asked for).
    """
    head = head_of(model)
    cap = None if head.cap is None else head.cap / temperature
    with torch.autocast(hidden.device.type, enabled=False):
        hidden = hidden.to(head.weight.dtype) / (temperature / head.scale)
        return TokenLogprobs.apply(hidden, head.weight, token_ids, with_entropy, cap)


@gathering
def completion_logprobs(model, batch, completion_ids, temperature, with_entropy=False):
    """log p(completion | prompt) per token, for the completions of a MicroBatch.

    completion_ids: (R, C), padded on the right with any token. Returns (log-probs, entropies), both
    (R, C) and 0 at padded places; the entropies, in nats, are None unless asked for.
    Every prompt runs through the model once, and the gradient flows back through it: result and
    gradient are those of R full sequences.
    """
    hidden, packing = hidden_before_completions(model, batch, completion_ids)  # (U, D)
    flat_ids = completion_ids.flatten()
    token_ids = flat_ids.index_select(0, packing.distinct)  # (U,)
    values = token_logprobs(model, hidden, token_ids, temperature, with_entropy)  # (U,) each

    def padded(values):
        zeros = values.new_zeros(completion_ids.numel())
        values = values.index_select(0, packing.same)  # (T,)
        return zeros.index_copy(0, packing.scored, values).view(completion_ids.shape)

    return tuple(None if value is None else padded(value) for value in values)


@torch.no_grad()
def logprobs_without_gradient(model, prompt_ids, lengths, completion_ids, args, pictures=None):
    """Log-probs of any number of completions, in passes of as many tokens as memory allows.

    prompt_ids: Q tensors (P,). lengths: Q lists of G numbers of tokens. completion_ids: (Q·G, C).
    args: temperature, and micro_batch_tokens, those of a pass *with* gradient (see
    shared_prefix.WITHOUT_GRADIENT). pictures: what the prompts show, Q, or None. Returns (Q·G, C),
    0 at padded places.
    """
    logprobs = completion_ids.new_zeros(completion_ids.shape, dtype=model.dtype)  # (Q·G, C)
    budget = WITHOUT_GRADIENT * args.micro_batch_tokens
    batches = micro_batches(prompt_ids, lengths, budget, completion_ids, pictures)
    for batch in batches:
        ids = completion_ids[batch.rows]  # (R, C)
        logprobs[batch.rows], _ = completion_logprobs(model, batch, ids, args.temperature)
        progress.tick(1, "passes", of=len(batches))
    return logprobs
