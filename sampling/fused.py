"""The recorded step in eight kernels per layer, where cuda_graph.py takes some forty: what lies
between two products is one kernel, written in Triton, which torch for CUDA brings along.

    add_norm    x + y, and its norm        ─ product ─   queries, keys, values
    attend      norms of heads, rotary embedding, cache, prompt, completion
                                           ─ product ─   output
    add_norm    x + y, and its norm        ─ product ─   gate, up
    gated       silu(gate) · up            ─ product ─   down

A row reads the prompt of its group by itself, unlike in decoder.py: on a GPU the others have just
had it in the cache of the chip. How much is written stands on the device, so that one recording
serves all lengths.

Letters as in decoder.py. Sums, norms and scores are in fp32.
"""

import torch
import triton
import triton.language as tl

from sampling.cuda_graph import GraphDecoder
from utils import UserError

BLOCK = 32  # keys at once: with heads of 128 numbers, what 8 warps hold without spilling
LEAST = 16  # rows and columns of the smallest product on tensor cores
COLUMNS = 1024  # of the MLP at once


def room(size, least=1):
    """The power of two that a kernel works on where there are `size` numbers."""
    return max(least, triton.next_power_of_2(size))


def add_norm(x, y, norm, dtype):
    """Add y (R, D) to x (R, D), in place, unless it is None. Returns the RMS norm of x, (R, D)."""
    out = torch.empty_like(x, dtype=dtype)
    rows, size = x.shape
    _add_norm[(rows,)](x, y, norm.weight, out, norm.variance_epsilon, size, room(size))
    return out


@triton.jit
def _add_norm(x, y, weight, out, epsilon, SIZE: tl.constexpr, ROOM: tl.constexpr):
    d = tl.arange(0, ROOM)
    real, at = d < SIZE, tl.program_id(0) * SIZE + d
    value = tl.load(x + at, real, 0.0).to(tl.float32)
    if y is not None:
        value += tl.load(y + at, real, 0.0).to(tl.float32)
        tl.store(x + at, value, real)
    scale = 1 / tl.sqrt(tl.sum(value * value, 0) / SIZE + epsilon)
    tl.store(out + at, value * scale * tl.load(weight + d, real, 0.0).to(tl.float32), real)


def gated(gate_up):
    """silu(gate) · up: from (R, 2I) to (R, I)."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, size)
    _gated[(rows, triton.cdiv(size, COLUMNS))](gate_up, out, size, COLUMNS)
    return out


@triton.jit
def _gated(gate_up, out, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    row, i = tl.program_id(0), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    gate = tl.load(gate_up + row * 2 * SIZE + i, i < SIZE, 0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * SIZE + SIZE + i, i < SIZE, 0.0).to(tl.float32)
    tl.store(out + row * SIZE + i, gate * tl.sigmoid(gate) * up, i < SIZE)


def attend(joint, rotary, prompt, cache, head_norms):
    """One token of every row: its query, key and value, joint (R, (H + 2K)·S), turned; its key and
    value written; attention to its prompt and its completion. Returns (R, H·S).

    rotary: cos and sin, (R, S). prompt: keys and values (Q, K, P, S) whose last axis is contiguous,
    what to add to their scores (Q, ..., P), and each row's question (R,). cache: keys and values
    (R, K, C, S) and how many tokens are `written`, (1,). head_norms: Qwen3's norms of queries and
    keys, or None.
    """
    prompt_keys, prompt_values, bias, question = prompt
    keys, values, written = cache
    rows, kv_heads, size = len(joint), keys.shape[1], keys.shape[3]
    heads = joint.shape[1] // size - 2 * kv_heads
    query_norm = key_norm = epsilon = None
    if head_norms:
        query_norm, key_norm = (norm.weight for norm in head_norms)
        epsilon = head_norms[0].variance_epsilon
    out = joint.new_empty(rows, heads * size)
    _attend[(rows, kv_heads)](
        joint, *rotary, query_norm, key_norm, epsilon,
        prompt_keys, *prompt_keys.stride()[:3], prompt_values, *prompt_values.stride()[:3],
        bias, bias.shape[-1], question,
        keys, values, keys.shape[2], written, out,
        kv_heads, heads // kv_heads, room(heads // kv_heads, LEAST), size, room(size, LEAST), BLOCK,
        num_warps=8, num_stages=2,
    )  # fmt: skip
    return out


@triton.jit
def _attend(
    joint, cos, sin, query_norm, key_norm, epsilon,
    prompt_keys, keys_q, keys_k, keys_p, prompt_values, values_q, values_k, values_p,
    bias, longest, question,
    keys, values, capacity, written, out,
    KV_HEADS: tl.constexpr, SHARE: tl.constexpr, SHARE_ROOM: tl.constexpr,
    SIZE: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """For one row and key-value head, and the SHARE heads that read it. What a softmax needs of the
    scores so far, their maximum and their sum of exponentials, goes along with the weighted sum of
    the values (arXiv 1805.02867)."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n, s = tl.arange(0, SHARE_ROOM)[:, None], tl.arange(0, ROOM)[None, :]
    one = tl.arange(0, 1)[:, None]
    cos, sin = cos + row * SIZE + s, sin + row * SIZE + s
    first = joint + row * (SHARE + 2) * KV_HEADS * SIZE
    query = first + (head * SHARE + n) * SIZE
    new_key = first + (KV_HEADS * SHARE + head + one) * SIZE
    q = _turned(query, n < SHARE, s, cos, sin, query_norm, epsilon, SIZE)  # (N, S)
    k = _turned(new_key, one < 1, s, cos, sin, key_norm, epsilon, SIZE)  # (1, S)
    v = tl.load(new_key + KV_HEADS * SIZE + s, s < SIZE, 0.0)  # (1, S)
    q *= 1 / tl.sqrt(SIZE * 1.0)

    # The token itself.
    now = tl.load(written)
    own = (row * KV_HEADS + head) * capacity * SIZE  # where the row's completion begins
    tl.store(keys + own + now * SIZE + s, k, s < SIZE)
    tl.store(values + own + now * SIZE + s, v, s < SIZE)
    highest = tl.sum(q * k, 1)  # (N,)
    total = tl.full((SHARE_ROOM,), 1.0, tl.float32)  # (N,)
    mean = tl.zeros((SHARE_ROOM, ROOM), tl.float32) + v.to(tl.float32)  # (N, S), times `total`

    # Those before it in the completion, then the prompt.
    for start in range(0, now, BLOCK):
        highest, total, mean = _with_block(
            q, keys + own, SIZE, values + own, SIZE, None, start, now, highest, total, mean,
            SIZE, ROOM, BLOCK,
        )  # fmt: skip
    asked = tl.load(question + row)
    for start in range(0, longest, BLOCK):
        highest, total, mean = _with_block(
            q, prompt_keys + asked * keys_q + head * keys_k, keys_p,
            prompt_values + asked * values_q + head * values_k, values_p,
            bias + asked * longest, start, longest, highest, total, mean, SIZE, ROOM, BLOCK,
        )  # fmt: skip
    at = out + (row * KV_HEADS + head) * SHARE * SIZE + n * SIZE + s
    tl.store(at, mean / total[:, None], (n < SHARE) & (s < SIZE))


@triton.jit
def _turned(start, real, s, cos, sin, norm, epsilon, SIZE: tl.constexpr):
    """The heads (N, S) that begin at `start` (N, 1), after their norm, if any, and the rotary
    embedding (arXiv 2104.09864)."""
    other = (s + SIZE // 2) % SIZE  # what s is turned with
    real = real & (s < SIZE)
    x = tl.load(start + s, real, 0.0).to(tl.float32)
    y = tl.load(start + other, real, 0.0).to(tl.float32)
    if norm is not None:
        scale = 1 / tl.sqrt(tl.sum(x * x, 1) / SIZE + epsilon)[:, None]
        x *= scale * tl.load(norm + s, s < SIZE, 0.0).to(tl.float32)
        y *= scale * tl.load(norm + other, s < SIZE, 0.0).to(tl.float32)
    sign = tl.where(s < SIZE // 2, -1.0, 1.0)
    return x * tl.load(cos, s < SIZE, 0.0) + sign * y * tl.load(sin, s < SIZE, 0.0)


@triton.jit
def _with_block(
    q, keys, keys_step, values, values_step, bias, start, stop, highest, total, mean,
    SIZE: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Attention that has seen the keys from `start` on as well, BLOCK of them before `stop`."""
    c, s = start + tl.arange(0, BLOCK), tl.arange(0, ROOM)
    real = (c < stop)[:, None] & (s < SIZE)[None, :]
    k = tl.load(keys + c[:, None] * keys_step + s[None, :], real, 0.0)  # (C, S)
    v = tl.load(values + c[:, None] * values_step + s[None, :], real, 0.0)  # (C, S)
    scores = tl.dot(q, tl.trans(k).to(tl.float32), input_precision="ieee")  # (N, C)
    if bias is not None:
        scores += tl.load(bias + c, c < stop, 0.0)[None, :]
    scores = tl.where((c < stop)[None, :], scores, -float("inf"))
    higher = tl.maximum(highest, tl.max(scores, 1))
    weights = tl.exp(scores - higher[:, None])
    shrunk = tl.exp(highest - higher)
    total = total * shrunk + tl.sum(weights, 1)
    added = tl.dot(weights, v.to(tl.float32), input_precision="ieee")
    return higher, total, mean * shrunk[:, None] + added


class FusedDecoder(GraphDecoder):
    """GraphDecoder, used in the same way."""

    def __init__(self, model, group_size, max_new_tokens, recorder):
        if model.config.hidden_act != "silu":
            raise UserError("--sampler fused: knows the activation silu, and this model has "
                            f"{model.config.hidden_act}; use --sampler shared_prefix")  # fmt: skip
        super().__init__(model, group_size, max_new_tokens, recorder)

    def length_to_read(self):
        """The kernels stop by themselves at what is written."""
        return self.max_new_tokens

    def _place_rows(self):
        self.of_question = self._on_device(self.question)  # (R,)

    def _one_token(self):
        with torch.autocast(self.device.type, enabled=False):
            x = self.decoder.embed_tokens(self.tokens)  # (R, D)
            rotary = self.decoder.rotary_emb(x, self.position[:, None])  # (R, 1, S) each
            which = self.prompt_bias, self.of_question
            y = None
            for layer, (module, block) in enumerate(zip(self.decoder.layers, self.blocks)):
                prompt = self.prompt_keys[layer], self.prompt_values[layer]
                cache = self.keys[layer], self.values[layer], self.now
                attention, mlp_norm = module.self_attn, module.post_attention_layernorm
                joint = block.query_key_value(add_norm(x, y, module.input_layernorm, self.dtype))
                y = block.output(attend(
                    joint, rotary, (*prompt, *which), cache,
                    block.head_norms and (attention.q_norm, attention.k_norm),
                ))  # fmt: skip
                y = block.down(gated(block.gate_up(add_norm(x, y, mlp_norm, self.dtype))))
            return self.head(add_norm(x, y, self.decoder.norm, x.dtype))
