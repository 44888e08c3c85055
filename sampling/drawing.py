"""A token drawn from logits: filters, inverse transform, the log-prob that the trainer will score.

N completions, R rows of the model whose distributions they draw from, V vocabulary, and as in
groups.py Q questions, G completions per question, C completion tokens.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

BLOCK = 128  # tokens; divides the vocabularies of Qwen2.5, Qwen3, LLaMA-3 and SmolLM2
BELOW_ONE = 1 - 2**-53  # the largest number below 1 in fp64


class Filters(NamedTuple):
    """Which tokens may be drawn: each filter acts on what the one before it left. These are off."""

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


NO_FILTERS = Filters()


def sample_tokens(logits, uniforms, temperature, filters=NO_FILTERS, row=None):
    """Draw one token per completion. logits: (R, V), uniforms: (N,) fp64 in [0, 1), one for each of
    N completions. row: (N,), whose distribution each draws from; by default each has its own.

    Returns (tokens, logprobs), both (N,). The log-probs are those of the *unfiltered* distribution
    at this temperature, which is what the trainer scores. Temperature 0 is greedy, scored at 1.
    """
    row = torch.arange(len(logits), device=logits.device) if row is None else row
    scale = 1 / temperature if temperature > 0 else 1.0
    probs = (logits * scale).softmax(-1)  # (R, V)
    if temperature > 0:
        tokens = _draw(_filtered(probs, filters), uniforms, row)
    else:
        tokens = logits.argmax(-1)[row]
    return tokens, probs[row, tokens].log()


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


def _draw(weights, uniforms, row):
    """Inverse transform: the first token whose cumulative weight exceeds the draw.

    Block by block first, then inside the block that was hit: summing a whole vocabulary up in fp64
    would cost as much as a layer of the model.
    """
    missing = -weights.shape[-1] % BLOCK
    blocks = F.pad(weights, (0, missing)) if missing else weights
    blocks = blocks.unflatten(-1, (-1, BLOCK))  # (R, V / BLOCK, BLOCK)
    block, left = _first_above(blocks.sum(-1)[row], uniforms)
    token, _ = _first_above(blocks[row, block], left)
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


def _filtered(probs, filters):
    top_k, top_p, min_p = filters
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
