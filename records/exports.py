"""Model directories that other programs, with transformers 4 in them, read as they are meant.

transformers 5 writes some facts under new names alone, which 4.57 does not know: it then computes
rotary embeddings from base 10,000 and without LLaMA-3's scaling, without a word, or refuses the
tokenizer. Both versions read what is written here, and we read it back.
"""

import json

import torch
from safetensors.torch import load_file, load_model

from training.lora import has_tower
from training.sharding import is_sharded, like
from vision.sight import class_of

WEIGHTS = "model.safetensors"


def write_for_others(folder):
    """Add to config.json and tokenizer_config.json, where there are such, what transformers 4 reads
    in place of rope_parameters, of the tokenizer's class and of its list of special tokens."""
    _rewrite(folder / "config.json", _with_rope)
    _rewrite(folder / "tokenizer_config.json", _with_known_class)


@torch.no_grad()
def load_weights(model, file, device):
    """Set a model's weights to those in a file, whole or cut up as the model is."""
    of_the_hub = has_tower(model) and file.name == WEIGHTS  # where names are its repositories'
    if not (is_sharded(model) or of_the_hub):
        load_model(model, file, device=device)
        return
    if of_the_hub:
        kind = class_of(model.config)
        weights = kind.from_pretrained(file.parent, dtype=model.dtype).state_dict()
    else:
        weights = load_file(file)
    for name, parameter in model.named_parameters():
        value = weights[name]
        parameter.copy_(like(value, parameter) if is_sharded(model) else value)


def _rewrite(file, change):
    if file.is_file():
        known = json.loads(file.read_text(encoding="utf-8"))
        text = json.dumps(change(known), indent=2, sort_keys=True, ensure_ascii=False)
        file.write_text(text + "\n", encoding="utf-8")


def _with_rope(config):
    """rope_theta and rope_scaling beside rope_parameters, which has both in one; of a model that
    sees, in its text part."""
    if isinstance(config.get("text_config"), dict):
        return {**config, "text_config": _with_rope(config["text_config"])}
    rope = dict(config.get("rope_parameters") or {})
    if "rope_theta" not in rope:
        return config
    theta = rope.pop("rope_theta")
    scaling = None if rope.get("rope_type", "default") == "default" else rope
    return {**config, "rope_theta": theta, "rope_scaling": scaling}


def _with_known_class(config):
    config = dict(config)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # of old the same, in both versions
    if isinstance(config.get("extra_special_tokens"), list):  # in version 4 that is a dict
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config
