"""How a family of models sees: an image becomes placeholders in a prompt, and features for them.

The image processor is always that of PIL and the placeholders are written here, on every machine
alike: transformers' own `*Processor` classes do the same where torchvision fits torch, and for two
of these families fail to load where it does not.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoImageProcessor,
)
from transformers.utils import cached_file

from training.pictures import Picture
from utils import UserError

MAY_BE_MISSING = dict.fromkeys(
    (
        "_raise_exceptions_for_gated_repo",
        "_raise_exceptions_for_missing_entries",
        "_raise_exceptions_for_connection_errors",
    ),
    False,
)
NOT_READ = ("rows", "cols")  # what an image processor says besides what the tower reads


@dataclass(frozen=True)
class Sight:
    """How images get into the prompts of one model. It is the tokenizer's attribute `sight`."""

    processor: object  # transformers' image processor
    config: object  # the model's
    token: str  # the placeholder; the chat template writes one for each image

    def placeholders(self, size):
        """What stands in a prompt for an image of this size, (width, height) in pixels."""
        return FAMILIES[self.config.model_type].written(self, size)

    def expanded(self, text, images):
        """A rendered chat with all placeholders of its images; the template wrote one for each.
        Raises UserError where there are others, such as in a question."""
        first, *rest = text.split(self.token)
        if len(rest) != len(images):
            raise UserError(f"a prompt has {len(rest)} times {self.token} for {len(images)} images "
                            f"({text[-60:]!r}); take it out of the question")  # fmt: skip
        places = (self.placeholders(image.size) for image in images)
        return first + "".join(f"{place}{part}" for place, part in zip(places, rest))


@dataclass(frozen=True)
class Family:
    """What differs between families."""

    written: Callable  # (sight, size) -> text
    bounded: Callable  # (processor, config, most) -> sizes an image processor is set to


def sees(config):
    """Whether a model of this configuration is of one of the FAMILIES that see."""
    return config.model_type in FAMILIES


def class_of(config):
    """transformers' class of the models that this configuration is of, None where there is none."""
    kinds = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if sees(config) else MODEL_FOR_CAUSAL_LM_MAPPING
    return kinds.get(type(config), None)


def load_sight(name, tokenizer, config, rendering, token=None):
    """The Sight of the model whose image processor is at `name`.

    An image takes at most rendering.image_tokens placeholders; raises UserError where this model's
    cannot be that few. The chat template becomes the one that knows images, where there is one.
    """
    processor = AutoImageProcessor.from_pretrained(name, token=token, backend="pil")
    bounds = FAMILIES[config.model_type].bounded(processor, config, rendering.image_tokens)
    for attribute, value in bounds.items():
        setattr(processor, attribute, value)
    if file := cached_file(name, "chat_template.json", token=token, **MAY_BE_MISSING):
        whole = json.loads(Path(file).read_text(encoding="utf-8"))
        tokenizer.chat_template = whole["chat_template"]
    return Sight(processor, config, tokenizer.convert_ids_to_tokens(config.image_token_id))


def save_reader(tokenizer, folder):
    """Write a model's tokenizer and, where it sees, its image processor, as transformers does."""
    tokenizer.save_pretrained(folder)
    if sight := sight_on(tokenizer):
        sight.processor.save_pretrained(folder)


def in_parts(role, content, images=0):
    """A message as chat templates of models that see take it: its images, then its text."""
    parts = [*[{"type": "image"}] * images, {"type": "text", "text": content}]
    return {"role": role, "content": parts}


def sight_on(tokenizer):
    """The tokenizer's Sight; None for a model that reads text alone."""
    return getattr(tokenizer, "sight", None)


def pictures_of(model, tokenizer, prompts, problems):
    """What each of these Problems' prompts (lists of ids) shows: Pictures, and None for those that
    show nothing; None instead of a list where none of them shows anything.

    The tower runs once for each, without gradient.
    """
    if not any(problem.images for problem in problems):
        return None
    pairs = zip(prompts, problems)
    return [picture_of(model, tokenizer, prompt, problem.images) for prompt, problem in pairs]


def picture_of(model, tokenizer, prompt, images):
    """The Picture that the model's tower makes of a prompt's images (functions that return them);
    None where it has none. prompt: a list of ids, whose placeholders are these images'."""
    if not images:
        return None
    sight = sight_on(tokenizer)
    inputs = sight.processor(images=[[image() for image in images]], return_tensors="pt")
    inputs = {name: value for name, value in inputs.items() if name not in NOT_READ}
    with torch.no_grad():
        on_device = {name: value.to(model.device) for name, value in inputs.items()}
        seen = model.get_image_features(**on_device, return_dict=True)
    features = torch.cat(list(seen.pooler_output))  # (I, D)
    deep = [torch.cat(list(layer)) for layer in getattr(seen, "deepstack_features", None) or ()]
    ids = np.array(prompt)
    places = np.flatnonzero(ids == sight.config.image_token_id)
    if len(places) != len(features):
        raise UserError(f"--model_name: its images are {len(features)} features and "
                        f"{len(places)} placeholders; its files do not fit together")  # fmt: skip
    return Picture(features, places, positions(model, prompt, inputs, places), tuple(deep))


def positions(model, prompt, inputs, places):
    """The positions (3, P) of a prompt's tokens where the model's rotary embeddings are multimodal,
    else None."""
    if not hasattr(model.model, "get_rope_index"):
        return None
    kinds = torch.zeros((1, len(prompt)), dtype=torch.int32, device="cpu")  # 0: text, 1: image
    kinds[0, places] = 1
    ids = torch.tensor([prompt], device="cpu")
    index, _ = model.model.get_rope_index(ids, kinds, image_grid_thw=inputs["image_grid_thw"])
    return index[:, 0].numpy()


# --- families ------------------------------------------------------------------------------------


def _idefics_written(sight, size):
    """A tile, or rows of them and then the whole image as one (Idefics3, arXiv 2408.12637)."""
    width, height = size
    _, rows, columns = sight.processor.get_number_of_image_patches(height, width)
    tile = sight.token * _idefics_tile(sight.config)
    whole = f"<fake_token_around_image><global-img>{tile}<fake_token_around_image>"
    if rows <= 1 and columns <= 1:
        return whole
    lines = (
        "".join(f"<fake_token_around_image><row_{row}_col_{column}>{tile}"
                for column in range(1, columns + 1))
        for row in range(1, rows + 1)
    )  # fmt: skip
    return "".join(f"{line}\n" for line in lines) + "\n" + whole


def _idefics_tile(config):
    """The placeholders of a tile."""
    vision = config.vision_config
    return (vision.image_size // vision.patch_size) ** 2 // config.scale_factor**2


def _idefics_bounded(processor, config, most):
    """One tile, or as many as the processor would cut where all of them fit."""
    tile, side = _idefics_tile(config), processor.max_image_size["longest_edge"]
    _check(tile, most)
    tiles = (processor.size["longest_edge"] // side) ** 2 + 1
    return {"do_image_splitting": processor.do_image_splitting and tiles * tile <= most}


def _llava_written(sight, size):
    return sight.token * sight.config.image_seq_length


def _llava_bounded(processor, config, most):
    _check(config.image_seq_length, most)
    return {}


def _qwen_written(sight, size):
    width, height = size
    patches = sight.processor.get_number_of_image_patches(height, width)
    return sight.token * (patches // sight.processor.merge_size**2)


def _qwen_bounded(processor, config, most):
    pixels = (processor.patch_size * processor.merge_size) ** 2  # of a placeholder
    largest = min(processor.size["longest_edge"], most * pixels)
    smallest = min(processor.size["shortest_edge"], largest)
    return {"size": type(processor.size)(shortest_edge=smallest, longest_edge=largest)}


def _check(least, most):
    if least > most:
        raise UserError(f"--image_tokens {most}: this model's images take {least}; raise it")


_IDEFICS, _QWEN = Family(_idefics_written, _idefics_bounded), Family(_qwen_written, _qwen_bounded)
FAMILIES = {  # by model type, as config.json names it
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "llava": Family(_llava_written, _llava_bounded),
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
}
