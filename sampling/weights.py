"""How the policy's weights reach vLLM after an update: --vllm_transfer.

    file        a safetensors file, in shared memory where there is room: any machine, any device
    broadcast   weight by weight from the policy's device to the engine's: NCCL, on a CPU gloo
    ipc         CUDA IPC: the engine is on the policy's own GPU and reads them where they lie

Adapters are folded in, and names and layout are those of the model's files. However they come,
vLLM's own reload puts them in place: it knows what it has fused, cut up and packed.
"""

import copy
import os
import shutil
import tempfile
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.distributed import TCPStore
from torch.multiprocessing.reductions import reduce_tensor
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from sampling.vllm_worker import broadcast, weights_group
from training.lora import whole_weight
from training.precision import DTYPES
from training.sharding import local_tensor
from utils import UserError

SHARED = Path("/dev/shm")
FOLDER = "GRPO_WEIGHTS_FOLDER"  # an environment variable: where weights go over instead
HERE = "127.0.0.1"  # the engine is a process of this machine


def way_to(engine, args, device):
    """send(engine, policy, args) of --vllm_transfer, which returns once the engine has the weights.

    Raises UserError where this way does not lead from the policy's device to the engine's.
    """
    if args.vllm_transfer == "file":
        return by_file
    devices, ours = engine.ask("devices"), device_name(device)
    if args.vllm_transfer == "ipc":
        if devices != [ours]:
            raise UserError("--vllm_transfer ipc: is for an engine on the run's own GPU, and it is "
                            "on another; use broadcast")  # fmt: skip
        for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
            if "expandable_segments:True" in os.environ.get(name, ""):
                raise UserError(f"--vllm_transfer ipc: {name} has expandable_segments, which other "
                                "processes may not open; leave it out")  # fmt: skip
        return by_ipc
    if ours in devices and ours != "cpu":
        raise UserError("--vllm_transfer broadcast: NCCL does not lead from a GPU to itself; give "
                        "vLLM others by --vllm_devices, or use ipc")  # fmt: skip
    if len({name == "cpu" for name in (ours, *devices)}) > 1:
        raise UserError("--vllm_transfer broadcast: one side is on a GPU and one is not; use file")
    meet(engine, device, 1 + len(devices), args.vllm_timeout)
    return by_broadcast


def device_name(device):
    """What a device is called by all programs that see it: a GPU's UUID, or "cpu"."""
    return "cpu" if device.type == "cpu" else str(torch.cuda.get_device_properties(device).uuid)


# --- the three ways ------------------------------------------------------------------------------


def by_file(engine, policy, args):
    with model_files(policy, args) as folder:
        engine.ask("weights", path=folder)


def meet(engine, device, size, seconds):
    """Join a process group, of which the policy's process is rank 0 and the engine's workers are
    the others."""
    wait = timedelta(seconds=seconds)
    store = TCPStore(HERE, 0, size, is_master=True, timeout=wait, wait_for_workers=False)
    engine.ask(
        "meet", lambda: engine.groups.append(weights_group(device, store, 0, size, wait)),
        host=HERE, port=store.port, size=size, seconds=seconds,
    )  # fmt: skip


def by_broadcast(engine, policy, args):
    weights, [group] = named_as_in_files(policy, args), engine.groups

    def send():
        for tensor in weights.values():
            broadcast(group, tensor.contiguous())

    engine.ask("weights", send, layout=[[name, *layout(x)] for name, x in weights.items()])


def by_ipc(engine, policy, args):
    # Copies, also where none is needed: torch keeps a record of every time it has shared a tensor,
    # as long as that is there. And until the engine has answered, what it reads has to be.
    weights = {name: x.clone() for name, x in named_as_in_files(policy, args).items()}
    handles = [[name, handle(tensor)] for name, tensor in weights.items()]
    torch.cuda.synchronize(policy.device)
    engine.ask("weights", handles=handles)
    del weights
    torch.cuda.ipc_collect()


def layout(tensor):
    return str(tensor.dtype).removeprefix("torch."), list(tensor.shape)


def handle(tensor):
    """How another process finds this tensor of a GPU: the arguments of torch's rebuild_cuda_tensor
    as JSON has them. Types are named as they are in torch, bytes in hexadecimal digits."""
    _, arguments = reduce_tensor(tensor)

    def plain(value):
        if isinstance(value, bytes):
            return {"bytes": value.hex()}
        if isinstance(value, (torch.dtype, type)):
            return {"torch": str(value).removeprefix("torch.") if isinstance(value, torch.dtype)
                    else value.__name__}  # fmt: skip
        return list(value) if isinstance(value, tuple) else value

    return [plain(value) for value in arguments]


# --- what goes over ------------------------------------------------------------------------------


def dtype_of(args):
    """What the engine computes in: what autocast does here, or fp32 without it."""
    return DTYPES[args.precision] or torch.float32


@torch.no_grad()
def plain_weights(policy, dtype):
    """(name, tensor) of a model without adapters that does what the policy does, on its device."""
    for name, parameter in policy.named_parameters():
        if ".lora_" in name:
            continue
        holder, _, kind = name.replace(".base_layer.", ".").rpartition(".")
        if ".base_layer." in name and kind == "weight":
            weight = whole_weight(policy.get_submodule(holder), dtype)
        else:
            weight = parameter.to(dtype)
        yield f"{holder}.{kind}", weight.detach()


def named_as_in_files(policy, args):
    """{name: tensor} as the policy's files would have them: what transformers has put together for
    its layers, such as experts, is taken apart again."""
    dtype = dtype_of(args)
    return revert_weight_conversion(_empty_model(policy, dtype), dict(plain_weights(policy, dtype)))


def _empty_model(policy, dtype):
    config = copy.deepcopy(policy.config)  # from_config changes it
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


@contextmanager
def model_files(policy, args):
    """A directory with the policy as any engine reads it, until it is left: where FOLDER says, else
    in shared memory, or among temporary files where there is none or too little."""
    dtype = dtype_of(args)
    weights = {name: tensor.cpu() for name, tensor in plain_weights(policy, dtype)}
    size = sum(tensor.nbytes for tensor in weights.values())
    has_room = SHARED.is_dir() and shutil.disk_usage(SHARED).free > 1.1 * size
    place = os.path.abspath(os.environ[FOLDER]) if os.environ.get(FOLDER) else None
    with tempfile.TemporaryDirectory(dir=place or (SHARED if has_room else None)) as folder:
        try:
            _empty_model(policy, dtype).save_pretrained(
                folder, state_dict=weights, max_shard_size="1TB"
            )
        except (OSError, SafetensorError) as error:
            raise UserError(f"--sampler vllm: no room for {size / 1e9:.1f} GB of weights in "
                            f"{Path(folder).parent}; {FOLDER} names another place ("
                            f"{str(error)[:50]})") from None  # fmt: skip
        yield folder


@torch.no_grad()
def fingerprints(policy):
    """A number for every parameter, or this process's part of it, which another one takes the place
    of once an update has changed it. Made of the numbers alone: whoever does so need not say so."""
    parts = [local_tensor(parameter) for parameter in policy.parameters()]
    hashes = [torch.hash_tensor(part) for part in parts if part.numel()]
    return torch.stack(hashes).tolist() if hashes else []
