"""How many weights an update changes: measured, and what storing them in bf16 does to it.

A bf16 number has 8 significant bits: w + dw is w again where |dw| is below some |w| / 512 to
|w| / 256. AdamW moves a weight by about the learning rate, so at 1e-6 nearly all weights of 0.02
stand still, whatever their gradients say, while the loss goes on as if they learnt.
"""

import itertools
import math

import torch

from training.sharding import local_tensor
from utils import parameters_of

SAMPLE = 2**20  # weights that are looked at, about


class WeightMeter:
    """Watches an optimizer's updates. They are seen on every k-th weight, all parameters counted
    through as one long row: an unbiased sample that needs no copy of the model. k is a prime, lest
    it fall into step with the width of the matrices; where there are no more than `sample` weights,
    it is 1.
    """

    def __init__(self, optimizer, sample=SAMPLE):
        self.parameters = parameters_of(optimizer)
        total = sum(p.numel() for p in self.parameters)
        self.stride = next(filter(_is_prime, itertools.count(math.ceil(total / sample))))
        self.seen = []  # both shares (2,) of every update, on the device
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def shares(self):
        """Means over the updates since the last call, 0 where there was none.

        weights_changed: the share of weights that an update changed. weights_changed_bf16: the
        share that it would have changed, had the same step been added to weights stored in bf16.
        """
        seen, self.seen = self.seen or [torch.zeros(2)], []
        changed, changed_bf16 = torch.stack(seen).mean(0).tolist()
        return {"weights_changed": changed, "weights_changed_bf16": changed_bf16}

    def _look(self):
        picked, start = [], 0
        for parameter in self.parameters:
            weights = local_tensor(parameter.detach())
            picked.append(weights.flatten()[start :: self.stride])
            start = (start - weights.numel()) % self.stride
        return torch.cat(picked)  # (weights / stride,)

    def _before(self, *_):
        self.old = self._look()

    def _after(self, *_):
        old, new = self.old, self._look()
        stored = old.bfloat16()
        moved = (stored.to(old.dtype) + (new - old)).bfloat16()
        self.seen.append(torch.stack([new != old, moved != stored]).float().mean(-1))
        del self.old


def _is_prime(number):
    return all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def keep_in_bfloat16(optimizer):
    """Round the weights to bf16 now and after every update, as if they were stored so.

    Nothing else changes: the tensors stay fp32, and so do gradients, AdamW's moments and its
    arithmetic, so that two runs compare storage alone.
    """

    @torch.no_grad()
    def round_weights(*_):
        for parameter in parameters_of(optimizer):
            parameter.copy_(parameter.bfloat16())

    round_weights()
    optimizer.register_step_post_hook(round_weights)
