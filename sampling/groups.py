"""Prompts in, `Rollouts` out: each prompt computed once, its keys and values shared by the group.

Letters: Q questions, G completions per question, R = Q·G rows (fewer as they finish), P prompt
tokens, C completion tokens, V vocabulary.

    python sampler.py MODEL "What is 3 + 4?"    a group, its rewards and its advantages
"""

import sys

if __name__ == "__main__":  # before the imports below, which take seconds
    from commands import main

    sys.exit(main(prog="sampler.py"))

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from decoder import Decoder, to_device
from graph_decoder import GraphDecoder, recorder_for
from llms import stop_token_ids
from static_decoder import static_decoder

# Tokens between two looks at which rows have finished, by device type; elsewhere 1. A look makes
# the host wait for the device. Rows that go on meanwhile are masked: the result is the same.
LOOK_EVERY = {"cuda": 16}

BLOCK = 128  # tokens; divides the vocabularies of Qwen2.5, Qwen3, LLaMA-3 and SmolLM2
BELOW_ONE = 1 - 2**-53  # the largest number below 1 in fp64


@dataclass(frozen=True)
class Rollouts:
    """What the policy wrote, token by token: the ids in here are the ids that get trained."""

    prompt_ids: list  # Q tensors (P,)
    completion_ids: torch.Tensor  # (Q, G, C); after a completion's end, the pad token
    completion_mask: torch.Tensor  # (Q, G, C), True up to and including the stop token
    logprobs: torch.Tensor  # (Q, G, C) of the full distribution at the sampling temperature
    finished: torch.Tensor  # (Q, G), False where max_new_tokens cut the completion off
    texts: list  # Q lists of G strings, without special tokens


def sample_tokens(logits, uniforms, temperature, top_k=0, top_p=1.0, min_p=0.0):
    """Draw one token per row. logits: (R, V), uniforms: (R,) fp64 in [0, 1), one per row.

    Returns (tokens, logprobs), both (R,). The log-probs are those of the *unfiltered* distribution
    at this temperature, which is what the trainer scores. Temperature 0 is greedy, scored at 1.
    Order of the filters, each on what the one before it left: top_k, top_p, min_p; 0, 1 and 0 turn
    them off.
    """
    scale = 1 / temperature if temperature > 0 else 1.0
    probs = (logits * scale).softmax(-1)  # (R, V)
    if temperature > 0:
        tokens = _draw(_filtered(probs, top_k, top_p, min_p), uniforms)
    else:
        tokens = logits.argmax(-1)
    return tokens, probs.gather(-1, tokens[:, None]).squeeze(-1).log()


def uniform_draws(seeds, questions, group_size, max_new_tokens, device):
    """Uniform numbers (C, Q·G), a column per row and a line per token; G columns per seed."""
    groups = [
        torch.rand(
            (max_new_tokens, group_size), dtype=torch.float64, device=device,
            generator=torch.Generator(device).manual_seed(seed),
        )
        for _, seed in zip(range(questions), seeds)
    ]  # fmt: skip
    return torch.cat(groups, dim=1)


def _draw(weights, uniforms):
    """Inverse transform: the first token whose cumulative weight exceeds the draw.

    Block by block first, then inside the block that was hit: summing a whole vocabulary up in fp64
    would cost as much as a layer of the model.
    """
    missing = -weights.shape[-1] % BLOCK
    blocks = F.pad(weights, (0, missing)) if missing else weights
    blocks = blocks.unflatten(-1, (-1, BLOCK))  # (R, V / BLOCK, BLOCK)
    block, left = _first_above(blocks.sum(-1), uniforms)
    token, _ = _first_above(blocks[torch.arange(len(block), device=block.device), block], left)
    return block * BLOCK + token


def _first_above(weights, uniforms):
    """Where in weights (R, N) draws in [0, 1) fall, and how far into that place, again in [0, 1).

    A place of weight 0 is never hit.
    """
    cumulative = weights.cumsum(-1, dtype=torch.float64)  # (R, N)
    draws = uniforms[:, None] * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, draws, right=True).clamp(max=weights.shape[-1] - 1)
    inside = weights.gather(-1, place).double()
    into = 1 - (cumulative.gather(-1, place) - draws) / inside
    return place.squeeze(-1), into.squeeze(-1).clamp(0, BELOW_ONE)


def _filtered(probs, top_k, top_p, min_p):
    if top_k > 0:
        kept = probs.topk(min(top_k, probs.shape[-1])).indices
        probs = torch.zeros_like(probs).scatter(-1, kept, probs.gather(-1, kept))
    if top_p < 1:
        ordered, index = probs.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # mass of the tokens likelier than this one
        ordered = ordered.masked_fill(before >= top_p * ordered.sum(-1, keepdim=True), 0.0)
        probs = torch.zeros_like(probs).scatter(-1, index, ordered)
    if min_p > 0:
        probs = probs.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0.0)
    return probs


@torch.no_grad()
def sample_rollouts(
    model,
    tokenizer,
    prompts,
    group_size,
    max_new_tokens,
    temperature,
    seeds=(),
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    compiled=False,
    watch=None,
):
    """Sample `group_size` completions for every prompt, all of them in one batch.

    prompts: Q lists of token ids. Nothing is read from the model's generation config but its stop
    tokens: its sampling defaults (Qwen ships top_k 20, top_p 0.8) would make the completions come
    from another distribution than the one that is trained.

    seeds: a number per prompt, which fixes every draw for that prompt's group. So a completion does
    not depend on which prompts share its batch, nor on when its neighbours finish. Temperature 0 is
    greedy and needs none. `compiled` runs the model's step through torch.compile (see
    static_decoder.py): the same tokens, up to rounding. `watch(tokens)` is called after every
    token, with those of the rows that had not finished.
    """
    device = model.get_input_embeddings().weight.device
    pad_id, stop_ids = padding_and_stops(model, tokenizer)
    stops = to_device(torch.tensor(stop_ids, device="cpu"), device)
    rows = len(prompts) * group_size
    ids = torch.full((rows, max_new_tokens), pad_id, device=device)
    mask = torch.zeros((rows, max_new_tokens), dtype=torch.bool, device=device)
    logprobs = torch.zeros((rows, max_new_tokens), device=device)
    finished = torch.zeros(rows, dtype=torch.bool, device=device)
    if temperature > 0:
        uniforms = uniform_draws(seeds, len(prompts), group_size, max_new_tokens, device)
    else:
        uniforms = torch.zeros((max_new_tokens, rows), dtype=torch.float64, device=device)

    if compiled:
        decoder = static_decoder(model, prompts, group_size, max_new_tokens)
    elif recorder := recorder_for(model, device.type):
        decoder = GraphDecoder(model, group_size, max_new_tokens, recorder)
    else:
        decoder = Decoder(model, group_size, max_new_tokens)
    logits = decoder.prefill(prompts)  # (R, V)
    live = torch.arange(rows, device=device)  # the row of `ids` that each live row writes
    look_every = LOOK_EVERY.get(device.type, 1)

    for t in range(max_new_tokens):
        tokens, scores = sample_tokens(
            logits, uniforms[t, live], temperature, top_k=top_k, top_p=top_p, min_p=min_p
        )
        writing = ~finished[live]
        ids[live, t] = torch.where(writing, tokens, pad_id)
        mask[live, t] = writing
        logprobs[live, t] = torch.where(writing, scores.float(), 0.0)
        finished[live] |= (tokens[:, None] == stops).any(-1)
        if watch:
            watch(ids[mask[:, t], t])
        if t + 1 == max_new_tokens:
            break
        if (t + 1) % look_every == 0:
            alive = (~finished[live]).cpu()  # the look
            if not alive.any():
                break
            if not alive.all():
                order = decoder.keep(alive)
                live, tokens = live[order], tokens[order]
        logits = decoder.step(tokens)

    return as_rollouts(tokenizer, prompts, group_size, ids, mask, logprobs, finished)


def padding_and_stops(model, tokenizer):
    """(the id after a completion's end, the ids that end one)."""
    stops = stop_token_ids(model, tokenizer)
    return (stops[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id), stops


def as_rollouts(tokenizer, prompts, group_size, ids, mask, logprobs, finished):
    """Rows, question by question, as Rollouts. ids, mask, logprobs: (Q·G, C), finished: (Q·G,)."""
    lengths = mask.sum(-1).tolist()
    texts = tokenizer.batch_decode(
        [row[:length] for row, length in zip(ids.tolist(), lengths)], skip_special_tokens=True
    )
    shape = (len(prompts), group_size, max(lengths))
    return Rollouts(
        prompt_ids=[to_device(torch.tensor(ids, device="cpu"), mask.device) for ids in prompts],
        completion_ids=ids[:, : shape[-1]].view(shape),
        completion_mask=mask[:, : shape[-1]].view(shape),
        logprobs=logprobs[:, : shape[-1]].view(shape),
        finished=finished.view(shape[:2]),
        texts=[texts[i : i + group_size] for i in range(0, len(texts), group_size)],
    )


def joined_rollouts(parts):
    """The Rollouts of several draws of questions as one, padded to the longest completion."""
    longest = max(part.completion_ids.shape[-1] for part in parts)

    def joined(name, padding=0):
        tensors = [getattr(part, name) for part in parts]
        return torch.cat([F.pad(x, (0, longest - x.shape[-1]), value=padding) for x in tensors])

    return Rollouts(
        prompt_ids=[ids for part in parts for ids in part.prompt_ids],
        completion_ids=joined("completion_ids"),
        completion_mask=joined("completion_mask", False),
        logprobs=joined("logprobs"),
        finished=torch.cat([part.finished for part in parts]),
        texts=[texts for part in parts for texts in part.texts],
    )
