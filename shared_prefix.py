"""One forward pass over several groups: every prompt once, the completions on top, no padding.

All prompts and completions stand behind one another in a single row of N tokens, so projections,
norms and MLPs see real tokens only. Attention alone knows who belongs to whom: a prompt attends to
itself, a completion to its prompt and to itself. It is an attention function registered with
transformers, so the layers stay the model's own, with whatever hooks, adapters or activation
checkpointing they carry, and the gradient of a prompt is the sum over its group by itself. Sharing
the prompt in training is Prefix Grouper's idea (arXiv 2506.05433).

Letters: Q questions, R completions, P prompt tokens (the longest), C completion tokens (the
longest), N tokens in the row, T scored tokens, H heads, K key-value heads, S head size.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "shared_prefix"  # its name as a model's attention implementation


@dataclass(frozen=True)
class MicroBatch:
    """R completions that share a forward and backward pass, and the prompts they continue."""

    prompts: list  # tensors (P,)
    question: list  # R indices into `prompts`
    lengths: list  # R numbers of tokens
    rows: torch.Tensor  # (R,), which of the step's Q·G completions they are


def micro_batches(prompt_ids, mask, budget):
    """Cut the step's completions into passes of about `budget` tokens each, prompts included.

    prompt_ids: Q tensors (P,), mask: (Q, G, C); completions without a token in the mask are left
    out. 0: everything in one pass. Within a group long completions stand together, so that little
    is padded in attention. A completion that exceeds the budget by itself has a pass of its own.
    """
    lengths = mask.sum(-1).tolist()  # Q lists of G
    passes, spent = [], math.inf
    for question, prompt in enumerate(prompt_ids):
        group = sorted((length, g) for g, length in enumerate(lengths[question]) if length)
        asked = False  # whether the pass being filled holds this question's prompt
        for length, g in reversed(group):
            cost = length + (0 if asked else len(prompt))
            if spent + cost > (budget or math.inf) or not passes:
                passes.append([])
                spent, cost = 0, length + len(prompt)
            passes[-1].append((question, g, length))
            spent, asked = spent + cost, True
    return [_micro_batch(chosen, prompt_ids, mask) for chosen in passes]


def _micro_batch(chosen, prompt_ids, mask):
    questions = sorted({question for question, _, _ in chosen})
    rows = [question * mask.shape[1] + g for question, g, _ in chosen]
    return MicroBatch(
        prompts=[prompt_ids[question] for question in questions],
        question=[questions.index(question) for question, _, _ in chosen],
        lengths=[length for _, _, length in chosen],
        rows=torch.tensor(rows, device=mask.device),
    )


@dataclass(frozen=True)
class Packing:
    """Where everything stands in the row of N tokens; padded places point at its first token."""

    ids: torch.Tensor  # (1, N), all prompts, then all completions less their last tokens
    positions: torch.Tensor  # (1, N), counted from the start of the prompt
    prompts: torch.Tensor  # (Q, P)
    completions: torch.Tensor  # (R, C - 1)
    keys: torch.Tensor  # (R, P + C - 1), a completion's prompt, then itself
    prompt_bias: torch.Tensor  # (H/K * P, P), 0 where a token may attend, else -inf; for every head
    bias: torch.Tensor  # (R, 1, H/K * (C - 1), P + C - 1), the same for `keys`
    unpad: torch.Tensor  # (N,), each token's place among the Q·P and then R·(C - 1) padded ones
    before: torch.Tensor  # (T,), where the token before each scored one stands
    scored: torch.Tensor  # (T,), each scored token's place in completion_ids, flattened


def pack(batch, completion_ids, heads_per_key, dtype):
    """Lay out the R completions of a MicroBatch, whose ids are (R, C), and their Q prompts.

    heads_per_key: H / K, dtype: that of the attention. The arithmetic is done on the host, from
    plain numbers: nothing here waits for the device.
    """
    prompts = batch.prompts
    on_host = torch.device("cpu")
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts], device=on_host)  # (Q,)
    lengths = torch.tensor(batch.lengths, device=on_host)  # (R,)
    question = torch.tensor(batch.question, device=on_host)  # (R,)
    counts = torch.cat([prompt_lengths, lengths - 1])  # a last token predicts nothing
    starts = counts.cumsum(0) - counts
    offsets = torch.arange(max(*prompt_lengths.tolist(), completion_ids.shape[1]), device=on_host)

    def places(part):
        """[start, start + count) for every prompt or completion: places, and which are real."""
        real = offsets[: max(1, int(counts[part].max()))] < counts[part, None]
        return torch.where(real, starts[part, None] + offsets[: real.shape[1]], 0), real

    prompt_places, in_prompt = places(slice(len(prompts)))  # (Q, P)
    completion_places, in_completion = places(slice(len(prompts), None))  # (R, C - 1)
    width = completion_places.shape[1]
    causal = torch.ones(len(offsets), len(offsets), dtype=torch.bool, device=on_host).tril()
    of_prompt = in_prompt[question, None].expand(-1, width, -1)  # (R, C - 1, P)
    own = causal[:width, :width].expand(len(lengths), -1, -1)  # (R, C - 1, C - 1)
    longest = in_prompt.shape[1]
    real = torch.cat([in_prompt.flatten(), in_completion.flatten()])
    start = prompt_lengths[question, None]  # of a completion's positions
    positions = [offsets.expand(len(prompts), -1)[:, :longest][in_prompt]]
    positions.append((start + offsets[:width])[in_completion])
    last = (starts[: len(prompts)] + prompt_lengths - 1)[question, None]  # of each one's prompt
    is_scored = offsets[: completion_ids.shape[1]] < lengths[:, None]  # (R, C)
    is_read = is_scored.roll(-1, 1) & is_scored  # all of a completion but its last token
    is_read[:, -1] = False
    # A completion of n tokens is scored from the end of its prompt and its own first n - 1 tokens.
    is_before = torch.cat([lengths[:, None] > 0, in_completion], dim=1)

    def to_device(x):
        x = x.pin_memory() if completion_ids.is_cuda else x
        return x.to(completion_ids.device, non_blocking=True)

    def bias(visible):
        zeros = torch.zeros((), dtype=dtype, device=completion_ids.device)
        visible = to_device(visible).repeat(*[1] * (visible.ndim - 2), heads_per_key, 1)
        return zeros.masked_fill(~visible, -torch.inf)

    read = to_device(is_read.flatten().nonzero().squeeze(-1))
    return Packing(
        ids=torch.cat([*prompts, completion_ids.flatten().index_select(0, read)])[None],
        positions=to_device(torch.cat(positions))[None],
        prompts=to_device(prompt_places),
        completions=to_device(completion_places),
        keys=to_device(torch.cat([prompt_places[question], completion_places], dim=1)),
        prompt_bias=bias(causal[:longest, :longest]),
        bias=bias(torch.cat([of_prompt, own], dim=-1)[:, None]),
        unpad=to_device(real.nonzero().squeeze(-1)),
        before=to_device(torch.cat([last, completion_places], dim=1)[is_before]),
        scored=to_device(is_scored.flatten().nonzero().squeeze(-1)),
    )


def hidden_before_completions(model, batch, completion_ids):
    """The last hidden state before each completion token of a MicroBatch.

    completion_ids: (R, C). Returns (T, D) for the T real tokens alone, completion by completion,
    and the places (T,) of these tokens in completion_ids, flattened.
    """
    device, config = completion_ids.device.type, model.config
    dtype = model.get_input_embeddings().weight.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    share = config.num_attention_heads // config.num_key_value_heads
    packing = pack(batch, completion_ids, share, dtype)
    if model.config._attn_implementation != ATTENTION:
        model.set_attn_implementation(ATTENTION)
    hidden = model.get_decoder()(
        packing.ids,
        position_ids=packing.positions,
        attention_mask=packing.bias,  # one of four dimensions keeps it from making its own
        use_cache=False,
        packing=packing,
    ).last_hidden_state[0]  # (N, D)
    return hidden.index_select(0, packing.before), packing.scored


def shared_prefix_attention(
    module, query, key, value, attention_mask, scaling=None, packing=None, **kwargs
):
    """Attention among packed tokens; without a packing, transformers' SDPA as it is.

    query: (1, H, N, S), key and value: (1, K, N, S). Returns (1, N, H, S), and no weights. Dropout
    does not act: it would make the ratio differ from 1.
    """
    if packing is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    kv_heads, size = key.shape[1], key.shape[-1]
    query, key, value = (x[0].transpose(0, 1).flatten(1) for x in (query, key, value))  # (N, ·S)

    def attend(queries, keys, bias):
        """Rows of queries to rows of keys. The heads that share a key-value head stand behind one
        another as if they were tokens, so that keys and values need no repetition."""
        q = query.index_select(0, queries.flatten()).view(*queries.shape, kv_heads, -1, size)
        k, v = (
            x.index_select(0, keys.flatten()).view(*keys.shape, kv_heads, size).transpose(1, 2)
            for x in (key, value)
        )  # (R, K, P + C, S)
        q = q.permute(0, 2, 3, 1, 4).flatten(2, 3)  # (R, K, H/K * C, S)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scaling)
        out = out.unflatten(2, (-1, queries.shape[1])).permute(0, 3, 1, 2, 4)
        return out.reshape(queries.numel(), -1)  # (R * C, H * S)

    outputs = [
        attend(packing.prompts, packing.prompts, packing.prompt_bias),
        attend(packing.completions, packing.keys, packing.bias),
    ]
    out = torch.cat(outputs).index_select(0, packing.unpad)  # (N, H * S)
    return out.unflatten(-1, (-1, size))[None], None


AttentionInterface.register(ATTENTION, shared_prefix_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
