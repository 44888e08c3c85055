"""Linear layer, embedding, norm, activation: less to keep for the backward pass, less to compute.

What autograd keeps of transformers' RMS norm and SwiGLU, written as they are in seven and two
operations, is a quarter of a layer's activations and most of its time outside matrix products.
Only those families have them so that copy LLaMA's code; the modules of others stay as they are,
but for embeddings and linear layers, which are torch's own nearly everywhere.

Letters: N tokens, D hidden size, V vocabulary, I what a linear layer reads (of the MLP's last its
size inside), O what it gives.
"""

from types import MethodType

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

SILU = type(ACT2FN["silu"])


def make_lean(model):
    """Replace `forward` of the embedding, linear layers, norms and gated MLPs of this model's
    decoder, in place, where they compute what LLaMA's do.

    Values and gradients stay what they were, up to rounding. The model's modules, their parameters
    and their hooks stay as well. A second call changes nothing.
    """
    for module in model.get_decoder().modules():
        if _has_code_of(LlamaRMSNorm, module):
            module.forward = MethodType(_norm, module)
        elif _has_code_of(LlamaMLP, module) and isinstance(module.act_fn, SILU):
            module.forward = MethodType(_gated_mlp, module)
        elif _has_code_of(torch.nn.Embedding, module):
            module.forward = MethodType(_embedding, module)
        elif _has_code_of(torch.nn.Linear, module):
            module.forward = MethodType(_linear, module)


def _has_code_of(original, module):
    """Whether the module's `forward` is a copy of this class's: transformers' families have them
    line by line, and where one does anything else, however little, the code is another."""
    ours, theirs = (kind.forward.__code__ for kind in (original, type(module)))
    parts = ("co_code", "co_names", "co_consts")
    return all(getattr(ours, part) == getattr(theirs, part) for part in parts)


def recompute_layers(model):
    """Activation checkpointing: the backward pass computes the layers' inside again.

    Transformers asks for train mode, in which some families drop out. It is enough that the layers
    themselves are in it, and not the modules in them.
    """
    model.activation_checkpointing_enable()
    for layer in checkpointed(model):
        layer.training = True


def checkpointed(model):
    """The layers that activation checkpointing goes by."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _norm(module, x):
    x = x.to(module.weight.dtype)  # Qwen3's heads come in bf16 under autocast, and leave in fp32
    if x.is_cuda:
        return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)
    return RMSNorm.apply(x, module.weight, module.variance_epsilon)


def _gated_mlp(module, x):
    return module.down_proj(SwiGLU.apply(module.gate_proj(x), module.up_proj(x)))


def _linear(module, x):
    weight = module.weight
    is_plain = type(weight) is torch.nn.Parameter and not torch.is_autocast_enabled("cpu")
    if is_plain and known_to_onednn(x, weight):
        return Linear.apply(x, weight, module.bias)
    return own_forward(module, x)


def _embedding(module, ids):
    if module.weight.is_cpu and not (module.max_norm or module.scale_grad_by_freq or module.sparse):
        return Embedding.apply(ids, module.weight, module.padding_idx)
    return own_forward(module, ids)


def own_forward(module, x):
    """What the module computes by itself."""
    return type(module).forward(module, x)


def known_to_onednn(*tensors):
    """Whether oneDNN can multiply these: fp32 on a CPU. torch takes MKL for it."""
    on_cpu = torch.backends.mkldnn.is_available() and all(x.is_cpu for x in tensors)
    return on_cpu and all(x.dtype == torch.float32 for x in tensors)


def onednn_is_faster():
    """Whether oneDNN multiplies matrices as they lie in memory faster than MKL: on an EPYC with
    AVX-512 it took down to five sixths of the time, on one without up to five fourths."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def product(x, weight, bias=None):
    """x W^T + b as F.linear has it, by the faster library on a CPU, without a graph.

    x: (..., I), weight: (O, I), of any strides. Returns (..., O).
    """
    if known_to_onednn(x, weight) and onednn_is_faster():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class Linear(torch.autograd.Function):
    """x W^T + b, whose weights' gradient is added to what is there of it."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        """x: (..., I), weight: (O, I), bias: (O,) or None. Returns (..., O)."""
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (x, weight), (to_x, to_weight, to_bias) = ctx.saved_tensors, ctx.needs_input_grad
        rows = gradient.flatten(0, -2)  # (N, O)
        return (
            product(gradient, weight.T) if to_x else None,
            added_product(weight, rows.T, x.flatten(0, -2)) if to_weight else None,
            rows.sum(0) if to_bias else None,
        )


def added_product(leaf, a, b):
    """Add the product of two matrices to a leaf's gradient. What a backward pass then returns for
    the leaf: the product where it has none yet, else nothing."""
    if leaf.grad is None:
        return a @ b
    leaf.grad.addmm_(a, b)
    return None


class Embedding(torch.autograd.Function):
    """Rows of a matrix. What they give its gradient is added to what is there of it, if anything
    is: torch would fill a matrix of its size first, for a few rows. On a GPU torch's own adds in a
    fixed order.
    """

    @staticmethod
    def forward(ctx, ids, weight, padding_idx):
        """ids: (...), weight: (V, D), padding_idx: whose row learns nothing. Returns (..., D)."""
        ctx.save_for_backward(ids, weight)
        ctx.padding_idx = padding_idx
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        ids, weight = ctx.saved_tensors
        if ctx.padding_idx is not None:
            gradient = gradient.masked_fill((ids == ctx.padding_idx)[..., None], 0)
        total, given = gathered_gradient(weight)  # (V, D)
        total.index_add_(0, ids.flatten(), gradient.flatten(0, -2))
        return None, given, None


def gathered_gradient(weight):
    """(What a backward pass adds a leaf's gradient to, what it then returns for the leaf): its
    `grad` and nothing, or, where it has none yet, zeros twice."""
    if weight.grad is not None:
        return weight.grad, None
    zeros = torch.zeros_like(weight)
    return zeros, zeros


class RMSNorm(torch.autograd.Function):
    """weight · x / sqrt(mean(x²) + epsilon) (arXiv 1910.07467, eq. 4); on a GPU torch has a kernel.

    Keeps x, which the residual stream holds in any case, and a number per token.
    """

    @staticmethod
    def forward(ctx, x, weight, epsilon):
        """x: (..., D), weight: (D,). Returns (..., D)."""
        scale = torch.linalg.vecdot(x, x)[..., None].div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight, scale = ctx.saved_tensors
        normed = x * scale  # (..., D)
        to_weight = None
        if ctx.needs_input_grad[1]:
            to_weight = (gradient * normed).flatten(0, -2).sum(0)  # (D,)
        gradient = gradient * weight
        # The part of the gradient along x changes nothing: it only makes x longer.
        along = torch.linalg.vecdot(gradient, normed)[..., None].div_(-x.shape[-1])
        return torch.addcmul(gradient, normed, along).mul_(scale), to_weight, None


class SwiGLU(torch.autograd.Function):
    """silu(gate) · up (arXiv 2002.05202); silu(gate) is computed again in the backward pass."""

    @staticmethod
    def forward(ctx, gate, up):
        """gate, up: (..., I). Returns (..., I)."""
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        gate, up = ctx.saved_tensors
        to_up = F.silu(gate).mul_(gradient)
        return torch.ops.aten.silu_backward(gradient * up, gate), to_up
