"""AdamW, its schedule, and the one place where gradients become an update."""

import math

import torch

from training.lora import trained_parameters
from training.precision import LossScale
from training.sharding import whole_tensor
from training.weight_meter import keep_in_bfloat16
from utils import parameters_of


def apply_gradients(optimizer, loss, max_grad_norm, loss_scale=None):
    """Clip, update and clear. Returns (gradient norm before clipping, 1 if the update was skipped).

    A loss or gradient that is not finite leaves weights and Adam's moments untouched. loss_scale:
    the LossScale that the gradients, and not the loss, are multiplied by, if any.
    """
    loss_scale = loss_scale or LossScale()
    loss_scale.unscale(parameters_of(optimizer))
    grad_norm = clip_gradients(parameters_of(optimizer), max_grad_norm)
    finite = bool(torch.isfinite(grad_norm) & torch.isfinite(loss))
    if finite:
        optimizer.step()
    optimizer.zero_grad()
    loss_scale.learn(finite)
    return grad_norm, int(not finite)


def clip_gradients(parameters, max_grad_norm):
    """Scale the gradients down to this norm, 0: never. Returns the norm before.

    Squares are summed row by row and the rows in fp64: in one fp32 sum, as torch's clip_grad_norm_
    has it on a CPU, small ones no longer change a large one, and the norm of 134 million numbers
    comes out 1.4 % too small.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    rows = (torch.linalg.vector_norm(gradient, dim=-1) for gradient in gradients)
    norms = [torch.linalg.vector_norm(of_rows, dtype=torch.float64) for of_rows in rows]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm or math.inf, norm)
    return whole_tensor(norm)


def make_optimizer(policy, args, done=0):
    """AdamW with weight decay on matrices only, and its schedule, one step of it per GRPO step.

    The learning rate is a function of the steps `done` so far, so that no state of it is saved.
    """
    parameters = trained_parameters(policy)
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]  # norms and biases
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": args.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        fused=True,  # foreach would hold a second copy of the moments for an instant
    )
    if args.weights_dtype == "bfloat16":
        keep_in_bfloat16(optimizer)
    warmup = math.ceil(args.warmup_percent * args.num_train_iters)

    def factor(step):
        if step < warmup:
            return (step + 1) / warmup
        if args.lr_schedule == "constant":
            return 1.0
        progress = (step - warmup) / max(1, args.num_train_iters - warmup)
        return 0.5 * (1 + math.cos(math.pi * progress))

    for group in optimizer.param_groups:
        group["initial_lr"] = args.learning_rate  # what a schedule that starts later multiplies
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor, last_epoch=done - 1)
