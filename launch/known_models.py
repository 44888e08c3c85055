"""The shapes of models that `--plan` knows without asking the hub: fields of their config.json.

One entry per pair of base and -Instruct model, whose shapes are the same. Nothing is imported here.
"""

# Those that see, as config.json names them; see vision/sight.py.
SIGHTED_TYPES = ("idefics3", "smolvlm", "llava", "qwen2_5_vl", "qwen3_vl")


def _qwen2(hidden_size, layers, heads, kv_heads, intermediate_size, **other):
    return {
        "model_type": "qwen2",
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate_size,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        **other,
    }


def _llama(hidden_size, layers, heads, kv_heads, intermediate_size, **other):
    return {
        **_qwen2(hidden_size, layers, heads, kv_heads, intermediate_size),
        "model_type": "llama",
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        **other,
    }


_SHAPES = {
    "Qwen/Qwen2.5-0.5B": _qwen2(896, 24, 14, 2, 4864),
    "Qwen/Qwen2.5-1.5B": _qwen2(1536, 28, 12, 2, 8960),
    "Qwen/Qwen2.5-3B": _qwen2(2048, 36, 16, 2, 11008),
    "Qwen/Qwen2.5-7B": _qwen2(3584, 28, 28, 4, 18944, vocab_size=152064, tie_word_embeddings=False),
    "meta-llama/Llama-3.2-1B": _llama(2048, 16, 32, 8, 8192),
    "meta-llama/Llama-3.2-3B": _llama(3072, 28, 24, 8, 8192),
}
_QWEN2_5_VL_3B = {
    "model_type": "qwen2_5_vl",
    "text_config": _qwen2(2048, 36, 16, 2, 11008, max_position_embeddings=128000)
    | {"model_type": "qwen2_5_vl_text"},
    "vision_config": {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
        "out_hidden_size": 2048, "patch_size": 14, "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
    "tie_word_embeddings": True,
}  # fmt: skip
_SMOLLM2 = _llama(576, 30, 9, 3, 1536, vocab_size=49152, max_position_embeddings=8192)
_SMOLLM2_VISION = {
    "model_type": "llava",
    "text_config": _SMOLLM2,
    "vision_config": {"model_type": "efficientnet_lite0"},  # see vision/lite0.py
    "image_seq_length": 16,
    "tie_word_embeddings": True,
}
KNOWN_MODELS = {
    "Qwen/Qwen2.5-VL-3B-Instruct": _QWEN2_5_VL_3B,
    **{name + kind: shape for name, shape in _SHAPES.items() for kind in ("", "-Instruct")},
    "smollm2-135m": _SMOLLM2,
    "smollm2-135m+vision": _SMOLLM2_VISION,
}
