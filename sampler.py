"""Prompts in, `Rollouts` out: each prompt computed once, its keys and values shared by the group.

Letters: Q questions, G completions per question, R = Q·G rows (fewer as they finish), P prompt
tokens, C completion tokens, V vocabulary.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, DynamicLayer

from llms import head_logits, stop_token_ids

# Tokens between two looks at which rows have finished, by device type; elsewhere 1. A look makes
# the host wait for the device. Rows that go on meanwhile are masked: the result is the same.
LOOK_EVERY = {"cuda": 16}


@dataclass(frozen=True)
class Rollouts:
    """What the policy wrote, token by token: the ids in here are the ids that get trained."""

    prompt_ids: list  # Q tensors (P,)
    completion_ids: torch.Tensor  # (Q, G, C); after a completion's end, the pad token
    completion_mask: torch.Tensor  # (Q, G, C), True up to and including the stop token
    logprobs: torch.Tensor  # (Q, G, C) of the full distribution at the sampling temperature
    finished: torch.Tensor  # (Q, G), False where max_new_tokens cut the completion off
    texts: list  # Q lists of G strings, without special tokens


class GroupLayer(DynamicLayer):
    """One layer's keys and values for R rows in buffers allocated once, at the prefill.

    The first `update` brings the prompts (Q rows) and spreads each over its group; every later one
    writes a token for the rows still alive, which always stand in front.
    """

    def __init__(self, group_size, max_new_tokens):
        super().__init__()
        self.group_size, self.max_new_tokens = group_size, max_new_tokens
        self.length = 0

    def update(self, key_states, value_states, *args, **kwargs):
        # Under bf16 autocast the rotary embedding promotes keys, not values, to fp32; attention
        # would round them again at every token.
        key_states = key_states.to(value_states.dtype)
        rows, start, added = key_states.shape[0], self.length, key_states.shape[-2]
        self.length += added
        if not self.is_initialized:
            self.keys, self.values = self._spread(key_states), self._spread(value_states)
            self.is_initialized = True
            return key_states, value_states
        self.keys[:rows, :, start : self.length] = key_states
        self.values[:rows, :, start : self.length] = value_states
        return self.keys[:rows, :, : self.length], self.values[:rows, :, : self.length]

    def _spread(self, states):
        questions, heads, length, size = states.shape
        rows = questions * self.group_size
        buffer = states.new_empty(rows, heads, length + self.max_new_tokens, size)
        groups = buffer[:, :, :length].unflatten(0, (questions, self.group_size))
        groups.copy_(states[:, None].expand_as(groups))
        return buffer

    def get_seq_length(self):
        return self.length

    def move_rows(self, source, destination):
        for buffer in (self.keys, self.values):
            buffer[destination, :, : self.length] = buffer[source, :, : self.length]


def left_padded(prompt_ids, device):
    """Prompts (lists of ids) as one batch: ids (Q, P) and mask (Q, P), the padding on the left."""
    longest = max(len(ids) for ids in prompt_ids)
    padded = [[0] * (longest - len(ids)) + list(ids) for ids in prompt_ids]
    mask = [[False] * (longest - len(ids)) + [True] * len(ids) for ids in prompt_ids]
    return torch.tensor(padded, device=device), torch.tensor(mask, device=device)


def sample_tokens(logits, uniforms, temperature, top_k=0, top_p=1.0, min_p=0.0):
    """Draw one token per row. logits: (R, V), uniforms: (R,) fp64 in [0, 1), one per row.

    Returns (tokens, logprobs), both (R,). The log-probs are those of the *unfiltered* distribution
    at this temperature, which is what the trainer scores. Temperature 0 is greedy, scored at 1.
    Order of the filters, each on what the one before it left: top_k, top_p, min_p; 0, 1 and 0 turn
    them off.
    """
    if temperature > 0:
        logits = logits / temperature
    log_total = logits.logsumexp(-1, keepdim=True)  # (R, 1)
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        probs = _filtered((logits - log_total).exp(), top_k, top_p, min_p)
        # Inverse transform in fp64: the first token whose cumulative probability exceeds the draw.
        cumulative = probs.cumsum(-1, dtype=torch.float64)
        draws = uniforms[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, draws, right=True).squeeze(-1)
        tokens = tokens.clamp(max=logits.shape[-1] - 1)
    return tokens, (logits.gather(-1, tokens[:, None]) - log_total).squeeze(-1)


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


@contextmanager
def sdpa_attention(model):
    """Sampling runs on SDPA, which takes the mask of left-padded prompts as it is. Flash attention,
    where the model has it for training, would unpad the whole cache for every token."""
    config = model.config
    attention, config._attn_implementation = config._attn_implementation, "sdpa"
    try:
        yield
    finally:
        config._attn_implementation = attention


@torch.no_grad()
def sample_rollouts(
    model,
    tokenizer,
    prompts,
    group_size,
    max_new_tokens,
    temperature,
    generator=None,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
):
    """Sample `group_size` completions for every prompt, all of them in one batch.

    prompts: Q lists of token ids. Nothing is read from the model's generation config but its stop
    tokens: its sampling defaults (Qwen ships top_k 20, top_p 0.8) would make the completions come
    from another distribution than the one that is trained.

    The draw for row r and token t is fixed by the generator alone, so a completion does not depend
    on when its neighbours finish. Temperature 0 is greedy and needs no generator.
    """
    device = model.get_input_embeddings().weight.device
    stops = torch.tensor(stop_token_ids(model, tokenizer), device=device)
    rows = len(prompts) * group_size
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else int(stops[0])
    prompt_batch, prompt_mask = left_padded(prompts, device)  # (Q, P)
    prompt_length = prompt_batch.shape[1]

    ids = torch.full((rows, max_new_tokens), pad_id, device=device)
    mask = torch.zeros((rows, max_new_tokens), dtype=torch.bool, device=device)
    logprobs = torch.zeros((rows, max_new_tokens), device=device)
    finished = torch.zeros(rows, dtype=torch.bool, device=device)
    uniforms = torch.empty((max_new_tokens, rows), dtype=torch.float64, device=device)
    if temperature > 0:
        uniforms.uniform_(generator=generator)

    decoder = model.get_decoder()
    layers = [GroupLayer(group_size, max_new_tokens) for _ in range(model.config.num_hidden_layers)]
    cache = Cache(layers=layers)
    # Positions count real tokens only; padding stands before position 0 and is masked.
    positions = (prompt_mask.cumsum(-1) - 1).clamp(min=0)
    hidden = decoder(
        prompt_batch, attention_mask=prompt_mask, position_ids=positions, past_key_values=cache
    ).last_hidden_state[:, -1]  # (Q, D)
    logits = head_logits(model, hidden).repeat_interleave(group_size, dim=0)  # (R, V)

    live = torch.arange(rows, device=device)  # the row of `ids` that each row of the cache writes
    next_position = prompt_mask.sum(-1).repeat_interleave(group_size)  # (R,)
    visible = torch.ones((rows, prompt_length + max_new_tokens), dtype=torch.bool, device=device)
    visible[:, :prompt_length] = prompt_mask.repeat_interleave(group_size, dim=0)
    look_every = LOOK_EVERY.get(device.type, 1)

    for t in range(max_new_tokens):
        tokens, scores = sample_tokens(
            logits, uniforms[t, live], temperature, top_k=top_k, top_p=top_p, min_p=min_p
        )
        writing = ~finished[live]
        ids[live, t] = torch.where(writing, tokens, pad_id)
        mask[live, t] = writing
        logprobs[live, t] = torch.where(writing, scores.float(), 0.0)
        finished[live] |= torch.isin(tokens, stops)
        if t + 1 == max_new_tokens:
            break
        if (t + 1) % look_every == 0:
            alive = ~finished[live]
            left = int(alive.sum())
            if left == 0:
                break
            if left < len(live):
                # Fill the gaps in front with the live rows from behind; nothing else moves.
                gaps = (~alive[:left]).nonzero().squeeze(-1)
                movers = alive[left:].nonzero().squeeze(-1) + left
                for layer in layers:
                    layer.move_rows(movers, gaps)
                order = torch.arange(left, device=device)
                order[gaps] = movers
                live, tokens = live[order], tokens[order]
        hidden = decoder(
            tokens[:, None],
            attention_mask=visible[live, None, None, : prompt_length + t + 1],  # (R, 1, 1, P + C)
            position_ids=(next_position[live] + t)[:, None],
            past_key_values=cache,
        ).last_hidden_state[:, -1]
        logits = head_logits(model, hidden)

    shape = (len(prompts), group_size, int(mask.sum(-1).max()))
    lengths = mask.sum(-1).tolist()
    texts = tokenizer.batch_decode(
        [row[:length] for row, length in zip(ids.tolist(), lengths)], skip_special_tokens=True
    )
    return Rollouts(
        prompt_ids=[torch.tensor(prompt, device=device) for prompt in prompts],
        completion_ids=ids[:, : shape[-1]].view(shape),
        completion_mask=mask[:, : shape[-1]].view(shape),
        logprobs=logprobs[:, : shape[-1]].view(shape),
        finished=finished.view(shape[:2]),
        texts=[texts[i : i + group_size] for i in range(0, rows, group_size)],
    )
