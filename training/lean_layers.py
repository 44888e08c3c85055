"""The layers' norm and activation with less to keep for the backward pass, and less to compute.

What autograd keeps of transformers' RMS norm and SwiGLU, written as they are in seven and two
operations, is a quarter of a layer's activations and most of its time outside matrix products.

Letters: N tokens, D hidden size, I size inside the MLP.
"""

from types import MethodType

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def make_lean(model):
    """Replace `forward` of the norms and gated MLPs of this model's decoder, in place.

    Values and gradients stay what they were, up to rounding. The model's modules, their parameters
    and their hooks stay as well. A second call changes nothing.
    """
    for module in model.get_decoder().modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = MethodType(_norm, module)
        elif hasattr(module, "gate_proj") and module.config.hidden_act == "silu":
            module.forward = MethodType(_gated_mlp, module)


def _norm(module, x):
    x = x.to(module.weight.dtype)  # Qwen3's heads come in bf16 under autocast, and leave in fp32
    if x.is_cuda:
        return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)
    return RMSNorm.apply(x, module.weight, module.variance_epsilon)


def _gated_mlp(module, x):
    return module.down_proj(SwiGLU.apply(module.gate_proj(x), module.up_proj(x)))


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
