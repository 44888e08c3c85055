"""LoRA (arXiv 2106.09685): the model is frozen and small matrices beside its linear layers learn.

    y = W x + alpha / r · B A x        A: (r, in), B: (out, r), which is 0 at first

The layers are peft's, the adapter is one of peft's: in here is what the rest has to know of it.
Whoever reads a weight takes `whole_weight`, whoever changes some takes `trained_parameters`.
"""

import os
import re
import warnings
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from training.precision import DTYPES, resolved
from utils import UserError

ADAPTER = "adapter_model.safetensors"  # as peft names it, and what it puts before a tensor's name
PREFIX = "base_model.model."


def add_adapter(policy, args, on_gpu=None):
    """Freeze the policy and give it an adapter as --lora_rank says, in place; 0 leaves it as it is.

    A is drawn from torch's global generator. The frozen matrices are stored in what --precision
    computes in, as those of llms.kl_reference are and for the same reason; the adapter is fp32 as
    any weight that learns.
    Raises UserError where the model lacks one of --lora_targets, which peft would leave out unsaid.
    """
    if not args.lora_rank:
        return
    from peft import LoraConfig  # seconds, and not a requirement

    config = LoraConfig(
        r=args.lora_rank, lora_alpha=args.lora_alpha, target_modules=adapted(policy, args),
        lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
    )  # fmt: skip
    linear = [name for name, module in policy.get_decoder().named_modules()
              if isinstance(module, torch.nn.Linear)]  # fmt: skip
    has = dict.fromkeys(name.rpartition(".")[2] for name in linear)
    if missing := [name for name in args.lora_targets if name not in has]:
        raise UserError(f"--lora_targets: the model has no {', '.join(missing)}; choose "
                        f"from {', '.join(has) or 'none'}")  # fmt: skip
    policy.add_adapter(config)
    base = args.model_name  # an absolute path where it is one: an adapter may be moved
    config.base_model_name_or_path = str(Path(base).resolve()) if os.path.isdir(base) else base
    on_gpu = policy.device.type == "cuda" if on_gpu is None else on_gpu
    if dtype := DTYPES[resolved(args.precision, on_gpu)]:
        for name, module in policy.get_decoder().named_modules():
            if isinstance(module, torch.nn.Linear) and ".lora_" not in name:
                module.to(dtype)


def adapted(policy, args):
    """What peft is told of the layers that get an adapter: their names, for a model that sees a
    pattern of whole names, since its tower has layers of these names too."""
    if not has_tower(policy):
        return list(args.lora_targets)
    decoder = policy.get_decoder()
    [name] = [name for name, module in policy.named_modules() if module is decoder]
    return rf"{re.escape(name)}\..*\.({'|'.join(args.lora_targets)})"


def has_adapter(model):
    return hasattr(model, "peft_config")


def has_tower(model):
    """Whether the model has, beside its decoder, a part that sees."""
    config = getattr(model, "config", None)  # any module has parameters to train
    return config is not None and config.get_text_config() is not config


def freeze_tower(model):
    """Have all of a model that sees keep its weights but the decoder and the head, in place."""
    model.requires_grad_(False)
    for part in (model.get_decoder(), model.get_output_embeddings()):
        part.requires_grad_()


def trained_parameters(model):
    """What training may change: the adapter; of a model without one all of it, but for the tower of
    one that sees."""
    named = list(model.named_parameters())
    if has_adapter(model):
        return [parameter for name, parameter in named if ".lora_" in name]
    if not has_tower(model):
        return [parameter for _, parameter in named]
    parts = (model.get_decoder(), model.get_output_embeddings())
    ours = {id(parameter) for part in parts for parameter in part.parameters()}
    return [parameter for _, parameter in named if id(parameter) in ours]


def whole_weight(linear, dtype):
    """The matrix (out, in) that a linear layer multiplies by, with its adapter folded in."""
    names = [] if getattr(linear, "disable_adapters", True) else linear.active_adapters
    weight = sum((linear.get_delta_weight(name) for name in names), linear.weight)
    return dithered(weight) if names and dtype == torch.bfloat16 else weight.to(dtype)


def dithered(weight):
    """fp32 as bf16, up or down by chance so that the mean is kept. What is bf16 already stays.

    Most models come in bf16, and to the nearest an adapter's small changes would mostly be undone:
    after a first step at 1.5e-4, two thirds of what it had done to SmolLM2-135M's log-probs were
    gone, against 2 % this way.
    """
    generator = torch.Generator(weight.device).manual_seed(0)  # the same chance for all batches
    noise = torch.randint(
        2**16, weight.shape, generator=generator, dtype=torch.int32, device=weight.device
    )
    # bf16 is the upper half of fp32.
    bits = weight.float().contiguous().view(torch.int32).add(noise).bitwise_and(-(2**16))
    return bits.view(torch.float32).bfloat16()


# --- files ---------------------------------------------------------------------------------------


def adapter_tensors(model):
    from peft import get_peft_model_state_dict

    # Left to itself, peft would ask the hub whether the vocabulary has grown.
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {f"{PREFIX}{name}": tensor.contiguous() for name, tensor in tensors.items()}


def save_adapter(model, file):
    """Write the adapter alone, as peft does: its tensors, and beside them what it is."""
    save_file(adapter_tensors(model), file)
    model.peft_config["default"].save_pretrained(file.parent)


def load_adapter(model, file, device="cpu"):
    """Set the model's adapter to that in a file. Raises ValueError where it is another one's."""
    from peft import set_peft_model_state_dict

    tensors = load_file(file, device)
    expected = {name: tensor.shape for name, tensor in adapter_tensors(model).items()}
    if {name: tensor.shape for name, tensor in tensors.items()} != expected:
        raise ValueError(f"{Path(file).name} is of another adapter")
    set_peft_model_state_dict(model, tensors)


def with_adapter(model, folder):
    """The model with the adapter in a directory, any that peft can merge, folded into its weights.

    One that was trained with further tokens brings its embeddings, to whose number of rows the
    model's are cut or filled up. Raises whatever peft does where the two do not fit.
    """
    from peft import PeftModel

    rows = embedding_rows(folder)
    if rows not in (None, model.get_input_embeddings().num_embeddings):
        model.resize_token_embeddings(rows, mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's, of transformers
        warnings.filterwarnings("error", "Found missing adapter keys")
        merged = PeftModel.from_pretrained(model, folder).merge_and_unload()
    return merged.requires_grad_()  # peft has frozen it


def embedding_rows(folder):
    """The number of tokens of which an adapter's file has embeddings of its own; None without."""
    file = Path(folder) / ADAPTER
    if file.is_file():
        with safe_open(file, "pt") as tensors:
            names = tensors.keys()
            shapes = {name: tensors.get_slice(name).get_shape() for name in names}
    else:
        tensors = torch.load(file.with_suffix(".bin"), map_location="meta", weights_only=True)
        shapes = {name: [*tensor.shape] for name, tensor in tensors.items()}
    rows = (s[0] for name, s in shapes.items() if re.search(r"embed_tokens\b.*\.weight$", name))
    return next(rows, None)


@torch.no_grad()
def settle_in_bfloat16(model):
    """Give the decoder's matrices values that bf16 has, for autocast would take the nearest."""
    for module in model.get_decoder().modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.copy_(dithered(module.weight))
