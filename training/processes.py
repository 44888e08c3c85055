"""Several processes with a device each: what they share out, and what becomes one again.

`torchrun` or `accelerate launch` start them, and every one runs main.py's loop. Each samples and
scores its own questions of a step's batch, then learns what the others have, so that all that
follows (advantages, the choice of completions, the log) is the same everywhere and as in a run of
one process. Then each trains on its own groups, gradients are summed, and all make the same update.

With one process nothing in here does anything.
"""

import re
from contextlib import contextmanager
from dataclasses import fields, replace
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.tensor import DTensor

from training.pictures import Picture
from training.precision import check_precision, resolved
from utils import parameters_of

# How long processes wait for one another: in the loop all are busy with the same, but the main one
# may fetch a model or write a checkpoint meanwhile.
IN_THE_LOOP, PATIENT = timedelta(minutes=10), timedelta(hours=3)


def make_accelerator(precision="auto", **more):
    """accelerate's Accelerator for this machine, with autocast in that precision. The loss is
    scaled by LossScale, not by accelerate's scaler. Raises UserError where a CPU cannot do it."""
    check_precision(precision := resolved(precision))
    return Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="no" if precision == "fp32" else precision,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=IN_THE_LOOP)], **more,
    )  # fmt: skip


@contextmanager
def patient(accelerator):
    """Inside, processes wait for one another for hours rather than minutes."""
    if accelerator.num_processes == 1:
        yield
        return
    _set_pg_timeout(PATIENT)
    try:
        yield
    finally:
        _set_pg_timeout(IN_THE_LOOP)


def own_part(items, accelerator, together=1):
    """This process's part of a list: parts follow each other and differ by one item at most; where
    so many that follow each other stay together, by one such block at most."""
    count, index = accelerator.num_processes, accelerator.process_index
    blocks = -(-len(items) // together)
    first, last = (blocks * n // count * together for n in (index, index + 1))
    return items[first:last]


def everyones(part, accelerator):
    """What all processes have, as a list in their order. On the host: tensors come on the CPU."""
    return gather_object([part]) if accelerator.num_processes > 1 else [part]


def everyones_rollouts(rollouts, accelerator):
    """The Rollouts of all processes, as a list in their order."""
    if accelerator.num_processes == 1:
        return [rollouts]
    return [_on(accelerator.device, part) for part in everyones(_on("cpu", rollouts), accelerator)]


def _on(device, rollouts):
    def moved(value):
        if isinstance(value, torch.Tensor):
            return value.to(device)
        if isinstance(value, Picture):
            deep = tuple(moved(part) for part in value.deep)
            return replace(value, features=moved(value.features), deep=deep)
        return [moved(item) for item in value] if isinstance(value, list) else value

    return replace(rollouts, **{x.name: moved(getattr(rollouts, x.name)) for x in fields(rollouts)})


def from_main(function, accelerator):
    """What `function()` gives in the main process, which alone calls it, for all of them."""
    if accelerator.num_processes == 1:
        return function()
    return broadcast_object_list([function() if accelerator.is_main_process else None])[0]


def own_groups(sizes, accelerator):
    """Which groups, of these numbers of tokens, this process trains on: Q booleans.

    All processes know all rollouts, so that groups need not be trained where they were sampled:
    they are dealt out from the largest to the smallest, each to whoever has least to do.
    """
    work, owners = [0] * accelerator.num_processes, [0] * len(sizes)
    for group in sorted(range(len(sizes)), key=lambda group: -sizes[group]):
        owners[group] = work.index(min(work))
        work[owners[group]] += sizes[group]
    return [owner == accelerator.process_index for owner in owners]


def sum_gradients(optimizer, accelerator):
    """Make every gradient the sum of all processes'; where one has none, it counts as 0. Where none
    has any, as in a step without signal, there is none, and the optimizer does nothing."""
    if accelerator.num_processes == 1:
        return
    # A sharded one's backward pass has summed it, see sharding.py.
    parameters = [p for p in parameters_of(optimizer) if not isinstance(p, DTensor)]
    if not any(everyones(any(p.grad is not None for p in parameters), accelerator)):
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        torch.distributed.all_reduce(parameter.grad)


def summed(numbers, accelerator):
    """The sums, over all processes, of a dict of numbers, of which some processes may lack some."""
    if accelerator.num_processes == 1:
        return numbers
    sums = {}
    for part in everyones({name: float(value) for name, value in numbers.items()}, accelerator):
        for name, value in part.items():
            sums[name] = sums.get(name, 0.0) + value
    return {name: torch.tensor(value, device="cpu") for name, value in sums.items()}


def lost_contact(error):
    """What an error of a collective operation says of another process; None for other errors."""
    if re.search(
        "closed by peer|reset by peer|Broken pipe|Socket closed|remote process", str(error)
    ):
        return "has ended"  # and said why
    if re.search("Timed out waiting|[Tt]imeout.*(collective|operation)", str(error)):
        return "does not answer"
    return None
