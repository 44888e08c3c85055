"""The demo's model that sees: SmolLM2-135M, in the shape of LLaVA (arXiv 2304.08485).

EfficientNet-Lite0's 16 places per picture (lite0.py) go through a projector of two layers into the
places of 16 placeholders. Its weights, and the means and deviations of the tower's numbers, were
learnt from drawn scenes by benchmarks/align_projector.py, with both halves as they are.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from reading.embedded import embedded_folder, kept
from utils import EMBEDDED_SIGHTED
from vision import lite0

PLACEHOLDER = "<file_sep>"  # a token that SmolLM2 was given for code, and the demo never writes
PROJECTOR = Path(__file__).parent / "projector.safetensors"
# SmolLM2's own, of messages in parts.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    f"{PLACEHOLDER}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def sighted_folder():
    """Where the model stands as a directory that transformers loads, given lite0.py."""
    files = [lite0.weights_file(), PROJECTOR, Path(__file__), Path(lite0.__file__)]
    return kept(EMBEDDED_SIGHTED, files, _made)


def _made():
    """(model, tokenizer, image processor)."""
    folder = embedded_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    model = sighted(AutoModelForCausalLM.from_pretrained(folder), tokenizer)
    load_projector(model)
    processor = CLIPImageProcessorPil(
        size={"height": lite0.SIDE, "width": lite0.SIDE}, do_center_crop=False,
        image_mean=[127 / 255] * 3, image_std=[128 / 255] * 3,
    )  # fmt: skip
    return model, tokenizer, processor


def sighted(model, tokenizer):
    """SmolLM2 as a LLaVA whose projector knows nothing yet. The two share their weights."""
    config = LlavaConfig(
        vision_config=lite0.Lite0Config(),
        text_config=model.config,
        image_token_index=tokenizer.convert_tokens_to_ids(PLACEHOLDER),
        image_seq_length=lite0.PLACES,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    whole = LlavaForConditionalGeneration._from_config(config)
    whole.model.language_model = model.model
    whole.lm_head = model.lm_head
    whole.generation_config = model.generation_config
    lite0.load_imagenet(whole.model.vision_tower)
    return whole


def load_projector(model, file=PROJECTOR):
    """Set projector and standardisation to those in the file, which are bf16."""
    learnt = load_file(file)
    tower = model.model.vision_tower
    with torch.no_grad():
        tower.mean.copy_(learnt.pop("mean"))
        tower.deviation.copy_(learnt.pop("deviation"))
        model.model.multi_modal_projector.load_state_dict(learnt)
