"""The policy as the sampler runs it: prompts once, then a token per call for every live row.

A group shares its prompt for good: the prompt's keys and values are computed, stored and read once
per question, and what all prompts begin with (chat template, system prompt) is computed once per
batch. Completions that are equal so far share a row, until their draws part (see training/tree.py).
Norms, activations and weights are the model's own; the order of operations is that of Qwen2,
Qwen3 and LLaMA, with the attention and its cache written out.

Letters: Q questions, G completions per question, R rows (at most Q·G), W rows of a question (the
most), P prompt tokens, C completion tokens so far, T tokens per row in one call, H heads, K
key-value heads, S head size, D hidden size, V vocabulary, L layers.
"""

from itertools import takewhile

import numpy as np
import torch
import torch.nn.functional as F

from training.lean_layers import known_to_onednn
from training.lora import whole_weight
from training.pictures import first_place, positions_after, prompt_positions, shown
from training.tree import first_equal, first_of_each
from utils import to_device


def left_padded(prompts, device):
    """Prompts (lists of ids) as one batch: ids (Q, P) and mask (Q, P), the padding on the left."""
    longest = max(len(ids) for ids in prompts)
    padded = [[0] * (longest - len(ids)) + list(ids) for ids in prompts]
    mask = [[False] * (longest - len(ids)) + [True] * len(ids) for ids in prompts]
    return tuple(to_device(torch.tensor(rows, device="cpu"), device) for rows in (padded, mask))


def joined(linears, dtype):
    """Linear layers that read the same input as one function, with a copy of their weights.

    The copy is made anew for every batch of rollouts, since the weights have moved; an adapter is
    folded into it and costs nothing more. On a GPU under autocast it is in bf16; autocast alone
    would round every weight again at every token. On a CPU oneDNN lays it out for its kernels once,
    which otherwise happens at every token as well.
    The function takes the input and, optionally, what to add to the output.
    """
    weight = torch.cat([whole_weight(linear, dtype) for linear in linears])
    bias = None
    if linears[0].bias is not None:
        bias = torch.cat([linear.bias for linear in linears]).to(dtype)

    if known_to_onednn(weight):
        packed, kernel = torch.ops.mkldnn._reorder_linear_weight(weight), torch.ops.mkldnn

        def product(x, plus=None):
            if plus is None:
                return kernel._linear_pointwise(x, packed, bias, "none", [], "")
            return kernel._linear_pointwise.binary(x, plus, packed, bias, "add")

    else:

        def product(x, plus=None):
            y = F.linear(x, weight, bias)
            return y if plus is None else plus + y

    return product


def arranged(parents):
    """Where rows go that continue those of numbers `parents`, (R',) on the host: each has one of
    the first R' places, and keeps its parent's where it can. Returns the places (R',) and what has
    to be copied: places (M,), from rows (M,), none of which is a place that is written."""
    first, _ = first_of_each(parents)
    places = np.full(len(parents), -1)
    staying = first[parents[first] < len(parents)]
    places[staying] = parents[staying]
    moving = np.flatnonzero(places < 0)
    places[moving] = np.setdiff1d(np.arange(len(parents)), places[staying])
    return places, places[moving], parents[moving]


def rotated(x, cos, sin):
    """Rotary position embedding (arXiv 2104.09864). x: (R, T, H, S), cos and sin: (R, T, 1, S)."""
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([-second, first], dim=-1), sin)


def attended(q, keys, values, bias=None):
    """Attention of q (R, K, N, S) to keys and values (R, K, C, S), and the log of its denominator,
    with which two such parts become one: (R, K, N, S) and (R, K, N, 1).

    Scores stay in the keys' precision. Under autocast that is fp32, as the rotary embedding is:
    Qwen2's biases make scores so large that bf16 would round them visibly.
    """
    if q.is_cpu and q.dtype == values.dtype:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, log_total = kernel(q, keys, values, attn_mask=bias)
        return out, log_total[..., None]
    scores = q @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5  # (R, K, N, C)
    if bias is not None:
        scores = scores + bias
    log_total = scores.logsumexp(-1, keepdim=True)
    return (scores - log_total).exp().to(values.dtype) @ values, log_total


def root_mean_square_norm(module):
    """The model's RMS norm as one kernel; the module itself is seven."""
    weight, epsilon = module.weight, module.variance_epsilon
    return lambda x: F.rms_norm(x, weight.shape, weight, epsilon)


class Block:
    """One layer of the model, ready to decode with."""

    def __init__(self, layer, dtype):
        attention, mlp = layer.self_attn, layer.mlp
        self.attention_norm = root_mean_square_norm(layer.input_layernorm)
        self.mlp_norm = root_mean_square_norm(layer.post_attention_layernorm)
        self.query_key_value = joined([attention.q_proj, attention.k_proj, attention.v_proj], dtype)
        self.output = joined([attention.o_proj], dtype)
        self.gate_up = joined([mlp.gate_proj, mlp.up_proj], dtype)
        self.down = joined([mlp.down_proj], dtype)
        self.activation = mlp.act_fn
        self.head_norms = None
        if hasattr(attention, "q_norm"):  # Qwen3
            self.head_norms = [
                root_mean_square_norm(norm) for norm in (attention.q_norm, attention.k_norm)
            ]


class Decoder:
    """`prefill` once, then `step` for every token; `branch` parts rows and drops finished ones.

    At first there is a row for each question, of equal ones for the first, or for each completion
    where it does not share. The rows of a question may stand anywhere: `place` (R,) says which of
    Q·W places each has, question by question.
    """

    @torch.inference_mode()
    def __init__(self, model, group_size, max_new_tokens, shares=True):
        decoder, config = model.get_decoder(), model.config.get_text_config()
        self.decoder, self.shares = decoder, shares
        self.group_size, self.max_new_tokens = group_size, max_new_tokens
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.device = decoder.embed_tokens.weight.device
        self.dtype = decoder.embed_tokens.weight.dtype
        if torch.is_autocast_enabled(self.device.type):
            self.dtype = torch.get_autocast_dtype(self.device.type)
        self.blocks = [Block(layer, self.dtype) for layer in decoder.layers]
        head = model.get_output_embeddings()
        self.head = joined([head], head.weight.dtype)  # not in bf16, see llms.TokenLogprobs

    @torch.inference_mode()
    def prefill(self, prompts, pictures=None):
        """Read the prompts (Q lists of ids) and their Pictures, if any show something. Logits
        (R, V) of every row's first token, and for each of the Q·G completions its row, on the
        host."""
        self.completions = len(prompts) * self.group_size
        rows = 1 if self.shares else self.group_size  # of each question
        row = np.arange(len(prompts) * rows).repeat(self.group_size // rows)  # (Q·G,)
        if self.shares and pictures is None:  # equal ids may show other pictures
            first, row = first_of_each(first_equal(map(tuple, prompts)).repeat(self.group_size))
            prompts = [prompts[place // self.group_size] for place in first]
        # A tensor per layer: one for all would seldom fit where the last batch's was freed.
        self.prompt_keys = self.prompt_values = ()  # L times (Q, K, P, S)
        self.prompt_mask = torch.ones((1, 0), dtype=torch.bool, device=self.device)  # (Q, P)
        # Every prompt keeps a token of its own, whose logits are wanted.
        columns = zip(*(prompt[:-1] for prompt in prompts))
        common = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
        common = min(common, first_place(pictures))  # equal placeholders show what differs
        if common:
            self._read([prompts[0][:common]])
        logits = self._read([prompt[common:] for prompt in prompts], pictures)  # (Q, V)

        bias = torch.zeros_like(self.prompt_mask, dtype=self.prompt_keys[0].dtype)
        self.prompt_bias = bias.masked_fill(~self.prompt_mask, -torch.inf)[:, None, None]
        self.question = np.arange(len(prompts)).repeat(rows)  # (R,), on the host
        after = positions_after(pictures, [len(prompt) for prompt in prompts])  # (Q,)
        self.position = self._on_device(after).repeat_interleave(rows)  # (R,)
        self.written = 0
        self._make_room()
        return logits.repeat_interleave(rows, dim=0), row

    def _make_room(self):
        """An empty cache for the completions."""
        self._place_rows()
        _, heads, _, size = self.prompt_keys[0].shape
        shape = (self.completions, heads, self.max_new_tokens, size)
        self.keys = [keys.new_empty(shape) for keys in self.prompt_keys]  # L times (R, K, C, S)
        self.values = [values.new_empty(shape) for values in self.prompt_values]

    def _place_rows(self):
        """Number the rows of each question, by which attention to the prompt goes."""
        order = np.argsort(self.question, kind="stable")
        counts = np.bincount(self.question)  # (Q,)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order)) - (counts.cumsum() - counts).repeat(counts)
        self.width = int(counts.max())
        place = torch.from_numpy(self.question * self.width + rank)
        self.place = to_device(place, self.device)  # (R,)

    @torch.inference_mode()
    def step(self, tokens):
        """Read one token (R,) per live row. Logits (R, V) of the next ones."""
        logits = self._layers(tokens[:, None], self.position[:, None], self._attend_group)
        self.position += 1
        self.written += 1
        return logits

    def length_to_read(self):
        """Of the completions' cache, by the next step: what is written and the token at hand."""
        return self.written + 1

    @torch.inference_mode()
    def branch(self, parents):
        """Rows that part and rows that end: from now on there are R' rows, each of which continues
        one of those so far. parents: (R',). Returns the number (R',) of each. Both on the host."""
        places, to, of = arranged(parents)
        parents = parents[np.argsort(places)]  # as the rows stand from now on
        self.question = self.question[parents]
        self.position = self.position[self._on_device(parents)]
        self._copy((*self.keys, *self.values), to, of, self.written)

        asked, question = np.unique(self.question, return_inverse=True)
        if len(asked) < len(self.prompt_bias):  # the same for questions of which no row is left
            places_left, to, of = arranged(asked)
            self._copy((*self.prompt_keys, *self.prompt_values), to, of)
            self.prompt_bias = self.prompt_bias[self._on_device(asked[np.argsort(places_left)])]
            question = places_left[question]
        self.question = question
        self._place_rows()
        return places

    def _on_device(self, numbers):
        return to_device(torch.from_numpy(numbers), self.device)

    def _copy(self, caches, to, of, length=None):
        if len(to):
            to, of = self._on_device(to), self._on_device(of)
            for cache in caches:
                cache[to, :, :length] = cache[of, :, :length]

    def _layers(self, ids, positions, attend, shown=None):
        """Run the model over ids (R, T), with this attention. Logits (R, V) after the last.
        positions: (R, T) or, for multimodal rotary embeddings, (3, R, T)."""
        with torch.autocast(self.device.type, enabled=False):  # `self.dtype` says it all
            x = self.decoder.embed_tokens(ids)  # (R, T, D)
            x = shown.put_into(x) if shown else x
            cos, sin = (part[:, :, None] for part in self.decoder.rotary_emb(x, positions))
            for layer, block in enumerate(self.blocks):
                joint = block.query_key_value(block.attention_norm(x).to(self.dtype))
                joint = joint.unflatten(-1, (-1, cos.shape[-1]))  # (R, T, H + 2K, S)
                turning, v = joint.split([self.heads + self.kv_heads, self.kv_heads], dim=2)
                turning = turning.to(cos.dtype)
                if block.head_norms:
                    parts = turning.split([self.heads, self.kv_heads], dim=2)
                    normed = [norm(part) for norm, part in zip(block.head_norms, parts)]
                    turning = torch.cat(normed, dim=2)
                turned = rotated(turning, cos, sin)
                q, k = turned.split([self.heads, self.kv_heads], dim=2)
                x = block.output(attend(layer, q, k, v).flatten(2), plus=x)
                gate, up = block.gate_up(block.mlp_norm(x).to(self.dtype)).chunk(2, dim=-1)
                x = block.down(block.activation(gate).mul_(up), plus=x)
                x = shown.deepen(x, layer) if shown else x
            return self.head(self.decoder.norm(x[:, -1]))

    def _read(self, prompts, pictures=None):
        """Append tokens to the prompts, Q lists or one for all. Logits (Q, V) after the last.
        pictures: those of the whole prompts; nothing is shown before these tokens."""
        ids, mask = left_padded(prompts, self.device)  # (Q, T)
        past = self.prompt_mask.expand(len(ids), -1)  # (Q, P)
        # Padding sees itself: a softmax over nothing would be 0/0.
        diagonal = torch.eye(ids.shape[1], dtype=torch.bool, device=self.device)
        own = mask.new_ones(diagonal.shape).tril() & mask[:, None] | diagonal  # (Q, T, T)
        visible = torch.cat([past[:, None].expand(-1, ids.shape[1], -1), own], dim=-1)[:, None]
        keys, values = [], []

        def attend(layer, q, k, v):
            k, v = k.transpose(1, 2), v.transpose(1, 2)  # (Q, K, T, S)
            if past.shape[1]:
                k = torch.cat([self.prompt_keys[layer].expand(len(ids), -1, -1, -1), k], dim=2)
                v = torch.cat([self.prompt_values[layer].expand(len(ids), -1, -1, -1), v], dim=2)
            keys.append(k)
            values.append(v)
            k, v = (
                x.to(self.dtype).repeat_interleave(self.heads // self.kv_heads, 1) for x in (k, v)
            )
            out = F.scaled_dot_product_attention(
                q.transpose(1, 2).to(self.dtype), k, v, attn_mask=visible
            )
            return out.transpose(1, 2)

        positions = past.sum(-1, keepdim=True) + (mask.cumsum(-1) - 1).clamp(min=0)
        before, width = past.shape[1], ids.shape[1]
        lengths = [before + len(prompt) for prompt in prompts]
        if turned := prompt_positions(pictures, lengths):
            padded = [np.pad(p[:, before:], ((0, 0), (width - p.shape[1] + before, 0)))
                      for p in turned]  # fmt: skip
            positions = self._on_device(np.stack(padded, axis=1))  # (3, Q, T)
        starts = [(row + 1) * width - length for row, length in enumerate(lengths)]
        logits = self._layers(ids, positions, attend, shown(pictures, starts, self.device))
        self.prompt_keys, self.prompt_values = keys, values
        self.prompt_mask = torch.cat([past, mask], dim=-1)
        return logits

    def _attend_group(self, layer, q, k, v):
        """Attention of one token per row: to its group's prompt, all rows of a group together, and
        to its own completion. q: (R, 1, H, S), k and v: (R, 1, K, S). Returns (R, 1, K, H/K, S).
        """
        questions = len(self.prompt_bias)
        own = self._remember(layer, k, v)
        q = q[:, 0].unflatten(1, (self.kv_heads, -1))  # (R, K, H/K, S)
        of_prompt, log_prompt = attended(
            self._by_group(q),  # (Q, K, W·H/K, S)
            self.prompt_keys[layer][:questions],
            self.prompt_values[layer][:questions],
            self.prompt_bias,
        )
        of_completion, log_completion = attended(q, *own)
        share = torch.sigmoid(self._by_row(log_prompt) - log_completion)  # of the prompt
        return torch.lerp(of_completion, self._by_row(of_prompt), share.to(v.dtype))[:, None]

    def _remember(self, layer, k, v):
        """Write one token per row, k and v: (R, 1, K, S). What the row has written by then."""
        rows, length = len(k), self.length_to_read()
        self.keys[layer][:rows, :, self.written] = k[:, 0]
        self.values[layer][:rows, :, self.written] = v[:, 0]
        return self.keys[layer][:rows, :, :length], self.values[layer][:rows, :, :length]

    def _by_group(self, x):
        """(R, K, H/K, S) as (Q, K, W·H/K, S), zero where a question has fewer rows."""
        shape = (len(self.prompt_bias), self.width, *x.shape[1:])
        grouped = x.new_zeros(shape[0] * shape[1], x[0].numel())
        grouped.index_copy_(0, self.place, x.flatten(1))
        return grouped.view(shape).transpose(1, 2).flatten(2, 3)

    def _by_row(self, x):
        """(Q, K, W·H/K, N) as (R, K, H/K, N)."""
        return x.unflatten(2, (self.width, -1)).transpose(1, 2).flatten(0, 1)[self.place]
