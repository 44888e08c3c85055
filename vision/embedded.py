"""The demo's model: SmolLM2-135M that sees, in the shape of LLaVA (arXiv 2304.08485).

EfficientNet-Lite0's 16 places per picture (lite0.py) go through a projector of two layers into the
places of 16 placeholders. Its weights, and the means and deviations of the tower's numbers, were
learnt from drawn scenes by benchmarks/align_projector.py, with both halves as they are.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlavaConfig, LlavaForConditionalGeneration

from vision.lite0 import Lite0Config, load_imagenet

PLACEHOLDER = "<file_sep>"  # a token that SmolLM2 was given for code, and the demo never writes
PROJECTOR = Path(__file__).parent / "projector.safetensors"


def sighted(model, tokenizer):
    """SmolLM2 as a LLaVA whose projector knows nothing yet. The two share their weights."""
    config = LlavaConfig(
        vision_config=Lite0Config(),
        text_config=model.config,
        image_token_index=tokenizer.convert_tokens_to_ids(PLACEHOLDER),
        image_seq_length=16,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    config.name_or_path = f"{model.config.name_or_path} + EfficientNet-Lite0"
    whole = LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    whole.model.language_model = model.model
    whole.lm_head = model.lm_head
    whole.generation_config = model.generation_config
    load_imagenet(whole.model.vision_tower)
    return whole


def load_projector(model, file=PROJECTOR):
    """Set projector and standardisation to those in the file, which are bf16."""
    learnt = load_file(file)
    tower = model.model.vision_tower
    with torch.no_grad():
        tower.mean.copy_(learnt.pop("mean"))
        tower.deviation.copy_(learnt.pop("deviation"))
        model.model.multi_modal_projector.load_state_dict(learnt)
