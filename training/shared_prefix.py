"""One forward pass over several groups: every distinct prefix once (see tree.py), no padding.

Of every prompt and of every completion what none before it shares, its own tokens, stand behind one
another in a single row of N tokens, so projections, norms and MLPs see each of them once and no
padding. Prompts share how they begin, which is the system message at least. Attention alone knows
who belongs to whom: a prompt attends to itself, own tokens to their prompt and to all of their
completion up to them, wherever that stands. It is an attention function registered with
transformers, so the layers stay the model's own, with whatever hooks, adapters or activation
checkpointing they carry, and the gradient of what is shared is the sum over those who share it by
itself. Sharing the prompt in training is Prefix Grouper's idea (arXiv 2506.05433).

Letters: Q questions, R completions, P prompt tokens (the longest), C completion tokens (the
longest), O own tokens (the most), N tokens in the row, T scored tokens, U distinct ones, H heads, K
key-value heads, S head size.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from training.lean_layers import make_lean
from training.pictures import positions_after, prompt_positions, shown
from training.tree import alone, first_equal, first_of_each, prefix_numbers
from utils import UserError, to_device

ATTENTION = "shared_prefix"  # its name as a model's attention implementation
# What layers hand to an attention function besides, and what changes nothing here.
IRRELEVANT = {
    "dropout", "position_ids", "use_cache", "output_attentions", "output_hidden_states",
    "output_router_logits", "return_dict", "past_key_values",
}  # fmt: skip

# Times the budget of a pass without gradient: it keeps nothing for a backward pass, and the larger
# it is, the fewer prompts are read again.
WITHOUT_GRADIENT = 4


@dataclass(frozen=True)
class MicroBatch:
    """R completions that share a forward and backward pass, and the prompts they continue."""

    prompts: list  # tensors (P,), without a copy where completions may share
    question: list  # R indices into `prompts`
    lengths: list  # R numbers of tokens
    prefixes: np.ndarray  # (R, C), the number of the prefix that ends at each token
    beginnings: np.ndarray  # (Q, P), the same of the prompts' tokens
    rows: torch.Tensor  # (R,), which of the step's Q·G completions they are
    pictures: list | None = None  # what each prompt shows: a Picture, or None


def micro_batches(prompt_ids, lengths, budget, completion_ids=None, pictures=None):
    """Cut the step's completions into passes of about `budget` distinct tokens each, prompts
    included.

    prompt_ids: Q tensors (P,). lengths: Q lists of G numbers of tokens; completions of none are
    left out. budget 0: everything in one pass. A completion that exceeds the budget by itself has a
    pass of its own. completion_ids: (Q·G, C), by which completions share, those of equal prompts as
    those of one; None: they do not. pictures: Q, see training/pictures.py; None: no prompt shows
    anything.

    Attention, and what it keeps for the backward pass, is padded to the most own tokens of a
    completion in a pass. So long ones stand together, and a pass ends before padding takes as much
    as the budget. Every pass reads the prompts of its completions again: a group is cut only if it
    has to be.
    """
    budget = budget or math.inf
    group_size = len(lengths[0])
    shared = completion_ids is not None and pictures is None  # equal ids may show other pictures
    asked, beginnings = _prompts(prompt_ids, shared)
    question = asked.repeat(group_size)  # (Q·G,)
    flat = [length for group in lengths for length in group]
    prefixes = _prefixes(flat, completion_ids, question)
    passes, held, read = [], set(), set()  # these and those below are of the pass being filled:
    spent = longest = padded = 0  # tokens, most own tokens, completions that have some
    for asked_first, prompt in enumerate(prompt_ids):
        rows = [row for row in np.flatnonzero(question == asked_first).tolist() if flat[row]]
        if not rows:
            continue
        begins = {*beginnings[asked_first, : len(prompt)].tolist()}
        group = {row: prefixes[row][prefixes[row] >= 0].tolist() for row in rows}
        # Copies behind each other, whose prefixes have equal numbers.
        order = sorted(rows, key=lambda row: (len(group[row]), group[row], row), reverse=True)
        distinct = len({number for numbers in group.values() for number in numbers})
        added = distinct + len(begins - read)
        if spent + added > budget >= distinct + len(prompt):
            spent = math.inf  # the pass being filled is full
        for row in order:
            own = sum(number not in held for number in group[row])
            cost = own + len(begins - read)
            longest, padded = max(longest, own), padded + (own > 0)
            if not passes or spent + cost > budget or padded * longest > 2 * budget:
                passes.append([])
                held, read, longest, padded = set(), set(), len(group[row]), 1
                spent, cost = 0, len(group[row]) + len(prompt)
            passes[-1].append(row)
            held.update(group[row])
            read.update(begins)
            spent += cost
    return [
        _micro_batch(rows, prompt_ids, beginnings, flat, prefixes, question, pictures)
        for rows in passes
    ]


def _prompts(prompt_ids, shared):
    """For each of Q prompts the first that is equal to it (Q,), and the numbers of its prefixes
    (Q, P), on the host. Where they are not `shared`, each is its own."""
    lengths = [len(prompt) for prompt in prompt_ids]
    if not shared:
        return np.arange(len(prompt_ids)), alone(lengths, max(lengths))
    ids = pad_sequence(prompt_ids, batch_first=True).cpu().numpy()  # (Q, P)
    numbers = prefix_numbers(ids, lengths, [0] * len(lengths))
    return first_equal(map(tuple, numbers.tolist())), numbers


def _prefixes(lengths, completion_ids, question):
    """The number of each completion's prefixes, (Q·G, C), on the host. lengths: Q·G numbers."""
    if completion_ids is None:
        return alone(lengths, max(lengths, default=0))
    return prefix_numbers(completion_ids.cpu().numpy(), lengths, question)


def _micro_batch(rows, prompt_ids, beginnings, lengths, prefixes, question, pictures):
    asked = question[rows].tolist()
    questions = sorted(set(asked))
    lengths = [lengths[row] for row in rows]
    return MicroBatch(
        prompts=[prompt_ids[question] for question in questions],
        question=[questions.index(question) for question in asked],
        lengths=lengths,
        prefixes=prefixes[rows, : max(lengths)],
        beginnings=beginnings[questions],
        rows=to_device(torch.tensor(rows, device="cpu"), prompt_ids[0].device),
        pictures=pictures and [pictures[question] for question in questions],
    )


def own_tokens(batch):
    """R numbers: how many of a completion's prefixes no completion before it in the pass has."""
    held, counts = set(), []
    for numbers in batch.prefixes:
        own = set(numbers[numbers >= 0].tolist()) - held
        counts.append(len(own))
        held |= own
    return counts


@dataclass(frozen=True)
class Packing:
    """Where everything stands in the row of N tokens; padded places point at its first token."""

    ids: torch.Tensor  # (1, N), what prompts do not share, then what completions do not
    positions: torch.Tensor  # (1, N), from the start of the prompt; (3, 1, N): see pictures.py
    shown: object  # what prompts show and where in the row, a pictures.Shown or None
    prompts: torch.Tensor  # (Q, P)
    own: torch.Tensor  # (R', O), of the R' completions that have own tokens
    keys: torch.Tensor  # (R', P + C - 1), their prompt, then all their tokens but the last
    prompt_bias: torch.Tensor  # (H/K * P, P), 0 where a token may attend, else -inf; for every head
    bias: torch.Tensor  # (R', 1, H/K * O, P + C - 1), the same for `keys`
    unpad: torch.Tensor  # (N,), each token's place among the Q·P and then R'·O padded ones
    before: torch.Tensor  # (U,), where the token before each distinct scored one stands
    distinct: torch.Tensor  # (U,), where that one first stands in completion_ids, flattened
    scored: torch.Tensor  # (T,), each scored token's place in completion_ids, flattened
    same: torch.Tensor  # (T,), which of the U it is
    narrowed: dict = field(default_factory=dict)  # the two biases, by window

    def biases(self, window):
        """`prompt_bias` and `bias` for layers where a token sees `window` tokens, itself included;
        None: all of them."""
        if window is None or window >= self.keys.shape[1]:
            return self.prompt_bias, self.bias
        if window not in self.narrowed:
            places = torch.arange(self.prompts.shape[1], device=self.prompts.device)  # (P,)
            # A padded query has the first token's position, from which no key is too far back.
            own, keys = (self.positions[0][x] for x in (self.own, self.keys))
            self.narrowed[window] = (
                narrowed(self.prompt_bias, places[:, None] - places, window),
                narrowed(self.bias, (own[:, :, None] - keys[:, None])[:, None], window),
            )
        return self.narrowed[window]


def narrowed(bias, distance, window):
    """The bias, -inf also where a key is `window` tokens or more before the query.

    bias: (..., H/K * O, L), distance: (..., O, L), the queries' positions less the keys'."""
    heads_per_key = bias.shape[-2] // max(1, distance.shape[-2])
    far = (distance >= window).repeat(*[1] * (distance.ndim - 2), heads_per_key, 1)
    width = bias.shape[-1]
    aligned = F.pad(bias, (0, -width % 8))  # a copy, laid out as `bias` is
    return aligned[..., :width].masked_fill_(far, -torch.inf)


def pack(batch, completion_ids, heads_per_key, dtype):
    """Lay out the R completions of a MicroBatch, whose ids are (R, C), and their Q prompts.

    heads_per_key: H / K, dtype: that of the attention. Places are worked out on the host, from
    plain numbers: nothing here waits for the device.
    """
    device = completion_ids.device
    question, lengths = np.array(batch.question), np.array(batch.lengths)  # (R,)
    prompt_lengths = np.array([len(prompt) for prompt in batch.prompts])  # (Q,)
    starts, in_prompt = _consecutive(prompt_lengths)  # (Q,), (Q, P)
    p, c = np.arange(in_prompt.shape[1]), np.arange(batch.prefixes.shape[1])
    prompts, is_first = _places(batch.beginnings[:, : len(p)], in_prompt)  # (Q, P) each
    read = is_first.sum()  # tokens of prompts

    # Of the tokens that end a prefix the first is read, the others find it there. A completion's
    # last token predicts nothing, and is not read.
    places = np.arange(completion_ids.numel()).reshape(completion_ids.shape)[:, : len(c)]  # (R, C)
    is_read, is_scored = c < lengths[:, None] - 1, c < lengths[:, None]  # (R, C)
    path, is_own = _places(batch.prefixes, is_read, read)  # (R, C) each
    count = is_own.sum(-1)  # (R,), they are the last that it reads
    rows = np.flatnonzero(count) if count.any() else np.array([0])  # (R',)
    own_starts, in_own = _consecutive(count[rows])  # (R',), (R', O)
    o = np.arange(in_own.shape[1])
    own = np.where(in_own, read + own_starts[:, None] + o, 0)  # (R', O)
    depth = (lengths - 1 - count)[rows, None] + o  # (R', O), in the completion
    after = positions_after(batch.pictures, prompt_lengths)  # (Q,)
    position = (after[question[rows], None] + depth)[in_own]
    if turned := prompt_positions(batch.pictures, prompt_lengths):
        position = np.broadcast_to(position, (3, len(position)))
        positions = np.concatenate([*turned, position], axis=1)[:, None]  # (3, 1, N)
    else:
        of_prompts = np.broadcast_to(p, in_prompt.shape)[is_first]
        positions = np.concatenate([of_prompts, position])[None]  # (1, N)
    path, c = path[:, :-1], c[:-1]
    of_prompt = np.broadcast_to(in_prompt[question[rows], None], (*in_own.shape, len(p)))
    of_itself = c <= depth[:, :, None]  # (R', O, C - 1)

    # A token is scored from the one before it, the first from the prompt's end.
    last = prompts[question, prompt_lengths[question] - 1, None]  # (R, 1)
    before = np.concatenate([last, path], axis=1)  # (R, C)
    scored = places[is_scored]  # (T,)
    distinct, same = first_of_each(batch.prefixes[is_scored])

    def on_device(array):
        return to_device(torch.from_numpy(array), device)

    def bias(visible):
        """0 where a token is visible, else -inf, once for every head of a key-value head."""
        width = visible.shape[-1]
        hidden = on_device(~visible).repeat(*[1] * (visible.ndim - 2), heads_per_key, 1)
        hidden = F.pad(hidden, (0, -width % 8))  # else CUDA copies it so for every layer
        values = torch.zeros(hidden.shape, dtype=dtype, device=device)
        return values.masked_fill(hidden, -torch.inf)[..., :width]

    begins = on_device(np.flatnonzero(is_first[in_prompt]))
    prompt_ids = torch.cat(batch.prompts).index_select(0, begins)
    own_ids = completion_ids.flatten().index_select(0, on_device(places[is_own]))
    return Packing(
        ids=torch.cat([prompt_ids, own_ids])[None],
        positions=on_device(positions),
        shown=shown(batch.pictures, starts, device),
        prompts=on_device(prompts),
        own=on_device(own),
        keys=on_device(np.concatenate([prompts[question[rows]], path[rows]], axis=1)),
        prompt_bias=bias(p <= p[:, None]),
        bias=bias(np.concatenate([of_prompt, of_itself], axis=-1)[:, None]),
        unpad=on_device(np.flatnonzero(np.concatenate([is_first.ravel(), in_own.ravel()]))),
        before=on_device(before[is_scored][distinct]),
        distinct=on_device(scored[distinct]),
        scored=on_device(scored),
        same=on_device(same),
    )


def _places(numbers, real, start=0):
    """Where the prefix that ends at each `real` token stands in the row, whose places from `start`
    on are filled in the order of the numbers' first tokens, and which tokens those are."""
    first, same = first_of_each(numbers[real])
    places, is_first = np.zeros(real.shape, dtype=np.int64), np.zeros(real.shape, dtype=bool)
    places[real] = start + same
    is_first.flat[np.flatnonzero(real)[first]] = True
    return places, is_first


def _consecutive(lengths):
    """Where each of N pieces in a row starts, (N,), and which of (N, L) padded places are real."""
    width = max(1, lengths.max())
    return lengths.cumsum() - lengths, np.arange(width) < lengths[:, None]


def hidden_before_completions(model, batch, completion_ids):
    """The last hidden state before each completion token of a MicroBatch.

    completion_ids: (R, C). Returns (U, D) for the U distinct real tokens, and the Packing, which
    says which these are and where the others find theirs.
    """
    device, config = completion_ids.device.type, model.config.get_text_config()
    dtype = model.get_input_embeddings().weight.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    heads = config.num_attention_heads
    share = heads // (getattr(config, "num_key_value_heads", None) or heads)
    packing = pack(batch, completion_ids, share, dtype)
    if config._attn_implementation != ATTENTION:
        model.set_attn_implementation(ATTENTION)
        make_lean(model)
    hidden = model.get_decoder()(
        **_read_by_the_layers(model, packing),
        position_ids=packing.positions,
        attention_mask=packing.bias,  # one of four dimensions keeps it from making its own
        use_cache=False,
        packing=packing,
    ).last_hidden_state[0]  # (N, D)
    return hidden.index_select(0, packing.before), packing


def _read_by_the_layers(model, packing):
    """The arguments of the decoder that say what it reads."""
    shown = packing.shown
    if shown is None:
        return {"input_ids": packing.ids}
    read = {"inputs_embeds": shown.put_into(model.get_input_embeddings()(packing.ids))}
    if shown.deep:
        seen = torch.zeros_like(packing.ids, dtype=torch.bool)  # (1, N)
        seen[0].index_fill_(0, shown.places, True)
        read |= {"visual_pos_masks": seen, "deepstack_visual_embeds": shown.deep}
    return read


def own_attention(model):
    """Have the model attend as transformers would have it; the next packed pass takes it back."""
    own = "sdpa" if model._supports_sdpa else "eager"
    if model.config._attn_implementation != own:
        model.set_attn_implementation(own)


def shared_prefix_attention(
    module, query, key, value, attention_mask, scaling=None, packing=None, **kwargs
):
    """Attention among packed tokens; without a packing, transformers' SDPA as it is.

    query: (1, H, N, S), key: (1, K, N, S), value: (1, K, N, S'). Returns (1, N, H, S'), and no
    weights. Dropout does not act: it would make the ratio differ from 1. Of what a family's layers
    ask for besides, `sliding_window` and `softcap` are done; raises UserError for anything else.
    """
    if packing is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    prompt_bias, bias = packing.biases(kwargs.pop("sliding_window", None))
    softcap = kwargs.pop("softcap", None)
    asked = {name for name, value in kwargs.items() if value is not None} - IRRELEVANT
    if kwargs.pop("is_causal", getattr(module, "is_causal", True)) is False:
        asked.add("no causal mask")
    if asked - {"is_causal"}:
        raise UserError(f"model type {module.config.model_type}: its attention asks for "
                        f"{', '.join(sorted(asked))}, which training does not do")  # fmt: skip
    kv_heads, size = key.shape[1], value.shape[-1]
    query, key, value = (x[0].transpose(0, 1).flatten(1) for x in (query, key, value))  # (N, ·S)

    def attend(queries, keys, bias):
        """Rows of queries to rows of keys. The heads that share a key-value head stand behind one
        another as if they were tokens, so that keys and values need no repetition."""
        k, v = (
            x.index_select(0, keys.flatten()).view(*keys.shape, kv_heads, -1).transpose(1, 2)
            for x in (key, value)
        )  # (R, K, P + C, S)
        q = query.index_select(0, queries.flatten())
        q = q.view(*queries.shape, kv_heads, -1, k.shape[-1])
        q = q.permute(0, 2, 3, 1, 4).flatten(2, 3)  # (R, K, H/K * C, S)
        if softcap is None:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scaling)
        else:  # arXiv 2408.00118, section 2
            scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * (scaling / softcap))
            out = (scores + bias).softmax(-1).to(v.dtype) @ v
        out = out.unflatten(2, (-1, queries.shape[1])).permute(0, 3, 1, 2, 4)
        return out.reshape(queries.numel(), -1)  # (R * C, H * S)

    outputs = [
        attend(packing.prompts, packing.prompts, prompt_bias),
        attend(packing.own, packing.keys, bias),
    ]
    out = torch.cat(outputs).index_select(0, packing.unpad)  # (N, H * S)
    return out.unflatten(-1, (-1, size))[None], None


AttentionInterface.register(ATTENTION, shared_prefix_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
