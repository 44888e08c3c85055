"""--precision: what a forward pass computes in. Weights, gradients and Adam's moments stay fp32.

Under autocast matrix products are in bf16 or fp16, and so are the sampler's copy of the weights and
a frozen reference. fp16 has three bits more than bf16, but ends at 65,504, and below 6e-8 there is
nothing: its backward pass runs on the loss times a LossScale.
"""

import sys
from dataclasses import dataclass

import torch

from utils import UserError

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # under autocast
START, GROW_AFTER = 2.0**16, 200  # of a LossScale; updates


def resolved(precision, on_gpu=None):
    """What "auto" means: on a GPU bf16, or fp16 where it has no bf16 (T4, V100); on a CPU fp32, but
    bf16 where it has AMX, which multiplies eight times as fast in it.

    on_gpu: whether it is of a GPU, by default of the one here, if there is one.
    """
    if precision != "auto":
        return precision
    if not (torch.cuda.is_available() if on_gpu is None else on_gpu):
        return "bf16" if cpu_has_amx() else "fp32"
    return "bf16" if not torch.cuda.is_available() or gpu_has_bf16() else "fp16"


def gpu_has_bf16():
    return torch.cuda.is_bf16_supported(including_emulation=False)


def cpu_has_amx():
    return torch.cpu._is_amx_tile_supported()


def cpu_has_bf16():
    """Whether this CPU multiplies in bf16 faster than in fp32: by AMX, or by AVX-512's BF16."""
    return cpu_has_amx() or torch.cpu._is_avx512_bf16_supported()


def check_precision(precision):
    """Raise UserError for fp16 on a CPU; say so where this device is slow at what is asked for."""
    on_gpu = torch.cuda.is_available()
    if precision == "fp16" and not on_gpu:
        raise UserError("--precision fp16: is for GPUs; on a CPU use fp32, or bf16")
    fast = gpu_has_bf16() if on_gpu else cpu_has_bf16()
    if precision == "bf16" and not fast:
        kind, better = ("GPU", "fp16") if on_gpu else ("CPU", "fp32")
        print(f"main.py: warning: --precision bf16: this {kind} has no units for it; {better} is "
              "likely faster", file=sys.stderr)  # fmt: skip


@dataclass
class LossScale:
    """What the loss is multiplied by before its backward pass, and gradients are divided by after
    it (arXiv 1710.03740, section 3.2). A power of two: nothing but the range changes.

    In fp16 it moves: halved where a gradient is not finite, which skips the update, and doubled
    after GROW_AFTER updates without. Else it is 1 for good.
    """

    scale: float = 1.0
    good: int = 0  # updates since it last changed
    moves: bool = False

    def unscale(self, parameters):
        if self.scale != 1:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(1 / self.scale)

    def learn(self, finite):
        """From an update, whose loss and gradients were finite or not."""
        if not self.moves:
            return
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.scale = max(1.0, self.scale / 2)
        elif self.good == GROW_AFTER:
            self.scale, self.good = self.scale * 2, 0


def loss_scale_of(precision):
    """The LossScale that a run begins with."""
    return LossScale(START, moves=True) if precision == "fp16" else LossScale()
