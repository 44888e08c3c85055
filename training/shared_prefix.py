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

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from training.lean_layers import make_lean
from utils import to_device

ATTENTION = "shared_prefix"  # its name as a model's attention implementation

# Times the budget of a pass without gradient: it keeps nothing for a backward pass, and the larger
# it is, the fewer prompts are read again.
WITHOUT_GRADIENT = 4


@dataclass(frozen=True)
class MicroBatch:
    """R completions that share a forward and backward pass, and the prompts they continue."""

    prompts: list  # tensors (P,)
    question: list  # R indices into `prompts`
    lengths: list  # R numbers of tokens
    rows: torch.Tensor  # (R,), which of the step's Q·G completions they are


def micro_batches(prompt_ids, lengths, budget):
    """Cut the step's completions into passes of about `budget` tokens each, prompts included.

    prompt_ids: Q tensors (P,). lengths: Q lists of G numbers of tokens; completions of none are
    left out. budget 0: everything in one pass. A completion that exceeds the budget by itself has a
    pass of its own.

    Attention, and what it keeps for the backward pass, is padded to the longest completion of a
    pass. So long ones stand together, and a pass ends before padding takes as much as the budget.
    Every pass reads the prompts of its completions again: a group is cut only if it has to be.
    """
    budget = budget or math.inf
    passes, spent, longest = [], 0, 0
    for question, prompt in enumerate(prompt_ids):
        group = sorted((length, g) for g, length in enumerate(lengths[question]) if length)
        asked = False  # whether the pass being filled holds this question's prompt
        whole = len(prompt) + sum(length for length, _ in group)
        if spent + whole > budget >= whole:
            spent = math.inf  # the pass being filled is full
        for length, g in reversed(group):
            cost = length + (0 if asked else len(prompt))
            longest = max(longest, length)
            if not passes or spent + cost > budget or (len(passes[-1]) + 1) * longest > 2 * budget:
                passes.append([])
                spent, cost, longest = 0, length + len(prompt), length
            passes[-1].append((question, g, length))
            spent, asked = spent + cost, True
    return [_micro_batch(chosen, prompt_ids, len(lengths[0])) for chosen in passes]


def _micro_batch(chosen, prompt_ids, group_size):
    questions = sorted({question for question, _, _ in chosen})
    rows = [question * group_size + g for question, g, _ in chosen]
    return MicroBatch(
        prompts=[prompt_ids[question] for question in questions],
        question=[questions.index(question) for question, _, _ in chosen],
        lengths=[length for _, _, length in chosen],
        rows=to_device(torch.tensor(rows, device="cpu"), prompt_ids[0].device),
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

    heads_per_key: H / K, dtype: that of the attention. Places are worked out on the host, from
    plain numbers: nothing here waits for the device.
    """
    device = completion_ids.device
    question, lengths = np.array(batch.question), np.array(batch.lengths)  # (R,)
    prompt_lengths = np.array([len(prompt) for prompt in batch.prompts])  # (Q,)
    starts, in_prompt = _consecutive(prompt_lengths)  # (Q,), (Q, P)
    row_starts, in_row = _consecutive(lengths - 1)  # (R,), (R, C - 1); a last token predicts none
    offset = np.arange(max(in_prompt.shape[1], completion_ids.shape[1]))
    p, c = offset[: in_prompt.shape[1]], offset[: in_row.shape[1]]
    prompts = np.where(in_prompt, starts[:, None] + p, 0)  # (Q, P)
    rows = np.where(in_row, prompt_lengths.sum() + row_starts[:, None] + c, 0)  # (R, C - 1)

    # A completion of n tokens is scored from the end of its prompt and its own first n - 1 tokens.
    last = (starts + prompt_lengths - 1)[question, None]  # (R, 1)
    before = np.concatenate([last, rows], axis=1)  # (R, C)
    is_before = np.concatenate([np.ones_like(last, dtype=bool), in_row], axis=1)
    position = prompt_lengths[question, None] + c  # (R, C - 1)
    positions = np.concatenate([np.broadcast_to(p, in_prompt.shape)[in_prompt], position[in_row]])

    in_ids = offset[: completion_ids.shape[1]]
    scored = np.flatnonzero(in_ids < lengths[:, None])
    read = np.flatnonzero(in_ids < lengths[:, None] - 1)
    of_prompt = np.broadcast_to(in_prompt[question, None], (len(rows), len(c), len(p)))
    of_itself = np.broadcast_to(c <= c[:, None], (len(rows), len(c), len(c)))

    def on_device(array):
        return to_device(torch.from_numpy(array), device)

    def bias(visible):
        """0 where a token is visible, else -inf, once for every head of a key-value head."""
        width = visible.shape[-1]
        hidden = on_device(~visible).repeat(*[1] * (visible.ndim - 2), heads_per_key, 1)
        hidden = F.pad(hidden, (0, -width % 8))  # else CUDA copies it so for every layer
        values = torch.zeros(hidden.shape, dtype=dtype, device=device)
        return values.masked_fill(hidden, -torch.inf)[..., :width]

    flat_ids = completion_ids.flatten()
    return Packing(
        ids=torch.cat([*batch.prompts, flat_ids.index_select(0, on_device(read))])[None],
        positions=on_device(positions)[None],
        prompts=on_device(prompts),
        completions=on_device(rows),
        keys=on_device(np.concatenate([prompts[question], rows], axis=1)),
        prompt_bias=bias(p <= p[:, None]),
        bias=bias(np.concatenate([of_prompt, of_itself], axis=-1)[:, None]),
        unpad=on_device(np.flatnonzero(np.concatenate([in_prompt.ravel(), in_row.ravel()]))),
        before=on_device(before[is_before]),
        scored=on_device(scored),
    )


def _consecutive(lengths):
    """Where each of N pieces in a row starts, (N,), and which of (N, L) padded places are real."""
    width = max(1, lengths.max())
    return lengths.cumsum() - lengths, np.arange(width) < lengths[:, None]


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
    if config._attn_implementation != ATTENTION:
        model.set_attn_implementation(ATTENTION)
        make_lean(model)
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
