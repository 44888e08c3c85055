"""Models too large for one device: every process keeps a part of weights, gradients and moments.

FSDP2, switched on by accelerate's configuration (configs/accelerate/8x80gb_fsdp2.yaml). A layer's
weights are gathered when it runs and dropped again; sampling gathers all of them for its time.
Precision stays what it is on one device: fp32 weights, gathered as they are, under autocast.
"""

import functools
from contextlib import contextmanager

import torch
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from training.lora import has_tower
from training.processes import everyones, own_groups
from training.shared_prefix import micro_batches
from utils import UserError

SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def shard_if_configured(policy, args, accelerator):
    """Cut the policy up where accelerate is configured for FSDP2. Raises UserError where it is
    configured for anything else that this program does not do, and for flags that do not fit."""
    if accelerator.is_fsdp2:
        if args.lora_rank:
            raise UserError("--lora_rank: adapters are not cut up; use 8x80gb_ddp.yaml")
        if args.sampler == "paged":
            raise UserError("--sampler paged: copies the model, which FSDP2 cannot; leave it out")
        shard(policy)
    elif accelerator.distributed_type not in SUPPORTED:
        kind = accelerator.distributed_type.value
        raise UserError(f"accelerate's configuration asks for {kind}, which is not supported; set "
                        "fsdp_version: 2, or use configs/accelerate/8x80gb_ddp.yaml")  # fmt: skip


def shard(policy):
    """Cut the policy up, in place: layer by layer, and what is around them."""
    for layer in policy.get_decoder().layers:
        fully_shard(layer, reshard_after_forward=True)
    fully_shard(policy, reshard_after_forward=True)
    for module in _parts(policy):
        module.set_gradient_divide_factor(1.0)  # gradients are summed, see processes.py
    type(policy).within = lambda self, function, *args, **kwargs: function(self, *args, **kwargs)
    register_fsdp_forward_method(policy, "within")
    with torch.no_grad():  # the first pass sets up what `whole` needs
        policy(torch.zeros((1, 1), dtype=torch.long, device=policy.device), use_cache=False)


def is_sharded(model):
    return isinstance(model, FSDPModule)


def _parts(model):
    return [module for module in model.modules() if is_sharded(module)]


def gathering(function):
    """Makes a function(model, ...) work where the model is sharded: it runs as a forward pass."""

    @functools.wraps(function)
    def call(model, *args, **kwargs):
        if is_sharded(model):
            return model.within(function, *args, **kwargs)
        return function(model, *args, **kwargs)

    return call


@contextmanager
def whole(policy):
    """All the policy's weights on every device for a while: for sampling, which reads them at every
    token. All processes come and go together."""
    if not is_sharded(policy):
        yield
        return
    for module in _parts(policy):
        module.unshard()
    try:
        yield
    finally:
        for module in _parts(policy):
            module.reshard()


def local_tensor(value):
    """This process's part of a sharded tensor; anything else as it is."""
    return value.to_local() if isinstance(value, DTensor) else value


def whole_tensor(value):
    """A sharded tensor's numbers, on every process; anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def whole_state(policy, optimizer, keep):
    """(weights by name, the optimizer's moments) on the CPU where the policy is sharded, else
    (None, the moments as they are). All processes call it; those that do not `keep` get nothing."""
    moments = optimizer.state_dict()["state"]
    if not is_sharded(policy):
        return None, moments

    def gathered(value):
        value = whole_tensor(value.detach())
        return value.cpu() if keep else None

    weights = {**dict(policy.named_parameters()), **saved_buffers(policy)}
    return _mapped(gathered, weights), _mapped(gathered, moments)


def saved_buffers(model):
    """Those that are saved with its weights, such as the means of a batch norm; none is cut up."""
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def _mapped(function, tree):
    return {
        key: _mapped(function, value) if isinstance(value, dict) else function(value)
        for key, value in tree.items()
    }


def whole_copy(policy):
    """An ordinary model with a sharded policy's weights."""
    kind = AutoModelForImageTextToText if has_tower(policy) else AutoModelForCausalLM
    copy = kind.from_config(policy.config, dtype=policy.dtype).to(policy.device)
    weights = {**dict(copy.named_parameters()), **saved_buffers(copy)}
    with torch.no_grad():
        for name, value in {**dict(policy.named_parameters()), **saved_buffers(policy)}.items():
            weights[name].copy_(whole_tensor(value))
    return copy


def like(value, sharded):
    """A whole tensor cut up as another one is."""
    value = value.to(sharded.device_mesh.device_type)
    return distribute_tensor(value, sharded.device_mesh, sharded.placements)


def own_batches(setup, prompt_ids, lengths, completion_ids, pictures=None):
    """What this process trains on: (own, lengths, batches, idle).

    prompt_ids: Q tensors (P,), lengths: Q lists of numbers of tokens, completion_ids: (Q·G, C),
    pictures: what the prompts show, Q, or None.
    `own` (Q,) says which groups are this process's; `lengths` are those, 0 in other groups, and
    `batches` their MicroBatches. `idle` are passes on top, over tokens of other groups, which must
    have no weight here.
    """
    policy, accelerator = setup.policy, setup.accelerator
    own = own_groups([sum(group) for group in lengths], accelerator)
    lengths = [[n * is_own for n in group] for group, is_own in zip(lengths, own)]
    budget = setup.args.micro_batch_tokens
    batches = micro_batches(prompt_ids, lengths, budget, completion_ids, pictures)
    # What an idle pass reads does not matter: it shows nothing.
    idle = _idle_passes(policy, prompt_ids, lengths, own, batches, accelerator)
    return own, lengths, batches, idle


def _idle_passes(policy, prompt_ids, lengths, own, batches, accelerator):
    """Passes over a token that another process trains on, for all processes to have as many
    MicroBatches: a sharded layer runs in all of them at once."""
    if not is_sharded(policy):
        return []
    missing = max(everyones(len(batches), accelerator)) - len(batches)
    if not missing:
        return []
    one_token = [[0 for _ in group] for group in lengths]
    one_token[own.index(False)][0] = 1
    return micro_batches(prompt_ids, one_token, 0) * missing
