"""Tiny random models that see, one of each family, and transformers' own forward pass of them."""

import numpy as np
import torch
from conftest import make_tokenizer
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
)

from vision.sight import Sight, picture_of

VOCABULARY, PLACEHOLDER, OPENS, CLOSES = 120, 100, 101, 102
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "tie_word_embeddings": True,
}  # fmt: skip
SIGLIP = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "image_size": 32,
          "num_attention_heads": 2, "patch_size": 8}  # fmt: skip
TILES = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
TURNING = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
QWEN = {"image_token_id": PLACEHOLDER, "vision_start_token_id": OPENS, "video_token_id": 99,
        "vision_end_token_id": CLOSES, "tie_word_embeddings": True}  # fmt: skip

PARTS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<image>", "<fake_token_around_image>", "<global-img>",
           *(f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2))]  # fmt: skip


def _idefics3():
    config = Idefics3Config(
        text_config={"model_type": "llama", **TEXT}, vision_config=SIGLIP, scale_factor=2,
        image_token_id=PLACEHOLDER, tie_word_embeddings=True, pad_token_id=None,
    )  # fmt: skip
    return Idefics3ForConditionalGeneration, config, Idefics3ImageProcessorPil(**TILES)


def _smolvlm():
    config = SmolVLMConfig(
        text_config={"model_type": "llama", **TEXT}, vision_config=SIGLIP, scale_factor=2,
        image_token_id=PLACEHOLDER, tie_word_embeddings=True, pad_token_id=None,
    )  # fmt: skip
    return SmolVLMForConditionalGeneration, config, SmolVLMImageProcessorPil(**TILES)


def _llava():
    config = LlavaConfig(
        text_config={"model_type": "llama", **TEXT}, image_token_index=PLACEHOLDER,
        vision_config={"model_type": "clip_vision_model", **SIGLIP}, image_seq_length=16,
        tie_word_embeddings=True,
    )  # fmt: skip
    side = {"height": 32, "width": 32}
    return LlavaForConditionalGeneration, config, CLIPImageProcessorPil(size=side, crop_size=side)


def _qwen2_5_vl():
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": TURNING}, **QWEN,
        vision_config={"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2,
                       "patch_size": 4, "out_hidden_size": 32, "fullatt_block_indexes": [1],
                       "window_size": 16},
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration, config, _qwen_processor()


def _qwen3_vl():
    config = Qwen3VLConfig(
        text_config={**TEXT, "head_dim": 8, "rope_parameters": TURNING}, **QWEN,
        vision_config={"depth": 3, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2,
                       "patch_size": 4, "out_hidden_size": 32, "num_position_embeddings": 16,
                       "deepstack_visual_indexes": [0, 1]},
    )  # fmt: skip
    return Qwen3VLForConditionalGeneration, config, _qwen_processor()


def _qwen_processor():
    size = {"shortest_edge": 64, "longest_edge": 64 * 64}
    return Qwen2VLImageProcessorPil(patch_size=4, size=size)


SIGHTED = {
    "idefics3": _idefics3, "smolvlm": _smolvlm, "llava": _llava, "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
}  # fmt: skip


class Reader:
    """What `picture_of` needs of a tokenizer."""

    def __init__(self, sight):
        self.sight = sight


def make_sighted(family, dtype=torch.float32, seed=0, vocab_size=None, placeholder=PLACEHOLDER):
    """(a random model of the family whose distributions are far from uniform, its Reader)."""
    model_class, config, processor = SIGHTED[family]()
    config.image_token_id = placeholder
    config.text_config.vocab_size = vocab_size or VOCABULARY
    torch.manual_seed(seed)
    model = model_class._from_config(config, attn_implementation="sdpa", dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "patch" not in name:
                parameter.mul_(8)
    return model, Reader(Sight(processor, config, "<image>"))


def make_seeing(family, dtype=torch.float32):
    """(the same, a tokenizer whose chats show images)."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = PARTS
    placeholder = tokenizer.convert_tokens_to_ids("<image>")
    model, reader = make_sighted(family, dtype, 0, len(tokenizer), placeholder)
    tokenizer.sight = reader.sight
    return model, tokenizer


def image(width, height, seed):
    """A function that returns an image of noise, as a Problem's images are."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return lambda: Image.fromarray(pixels)


class Sized:
    """An image as a Problem has it."""

    def __init__(self, width, height, seed=0):
        self.size, self.draw = (width, height), image(width, height, seed)
        self.shows = f"noise {seed} of {width} x {height}"

    def __repr__(self):
        return self.shows

    def __call__(self):
        return self.draw()


def prompt_with(model, reader, text, images):
    """(ids, Picture): the images after the text's first two tokens."""
    ids = list(text[:2])
    for one in images:
        width, height = one().size
        places = reader.sight.placeholders((width, height)).count("<image>")
        ids += [OPENS, *[PLACEHOLDER] * places, CLOSES]
    ids += text[2:]
    return ids, picture_of(model, reader, ids, images)


def forward_logprobs(model, reader, prompt, images, completions):
    """What transformers' own forward pass thinks of each completion, one sequence at a time."""
    inputs = {}
    if images:
        processed = reader.sight.processor(images=[[one() for one in images]], return_tensors="pt")
        inputs = {k: v for k, v in processed.items() if k not in ("rows", "cols")}
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    rows = []
    for completion in completions:
        ids = torch.tensor([[*prompt, *completion]])
        more = {}
        if "image_grid_thw" in inputs:
            more["mm_token_type_ids"] = (ids == PLACEHOLDER).int()
        logits = model(input_ids=ids, **inputs, **more).logits[0].log_softmax(-1)  # (T, V)
        places = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
        rows.append(logits[places, ids[0, len(prompt) :]])
    return rows
