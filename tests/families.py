"""Families of language models as tiny random ones: the fields of a real model's config.json that
say how it computes, with sizes small enough for a test.

Windows are of 8 tokens, so that a short text is longer than they are.
"""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "eos_token_id": None, "bos_token_id": None, "pad_token_id": None,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": [1.0, 1.1, 1.2],
    "long_factor": [1.5, 4.0, 9.0], "original_max_position_embeddings": 128,
    "partial_rotary_factor": 0.75,
}  # fmt: skip
GEMMA = {
    "head_dim": 8, "query_pre_attn_scalar": 16, "sliding_window": 8,
    "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip

# {the real model: (model type, the fields that make it differ)}
FAMILIES = {
    "Qwen2.5": ("qwen2", {"tie_word_embeddings": True, "rope_parameters": ROPE}),
    "Qwen2 with a window": ("qwen2", {"use_sliding_window": True, "sliding_window": 8,
                                      "max_window_layers": 2}),
    "Qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "LLaMA-3.2": ("llama", {"head_dim": 8, "tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "Mistral v0.1": ("mistral", {"sliding_window": 8, "rope_parameters": ROPE}),
    "Mistral v0.3": ("mistral", {"sliding_window": None, "rope_parameters": ROPE}),
    "SmolLM3": ("smollm3", {"no_rope_layers": [1, 1, 1, 0], "no_rope_layer_interval": 4,
                            "use_sliding_window": False, "tie_word_embeddings": True}),
    "Granite 3.3": ("granite", {"embedding_multiplier": 12.0, "residual_multiplier": 0.22,
                                "attention_multiplier": 0.015625, "logits_scaling": 8.0,
                                "tie_word_embeddings": True}),
    "OLMo-2": ("olmo2", {"rope_parameters": ROPE}),
    "OLMo-3": ("olmo3", {"sliding_window": 8, "rope_parameters": ROPE,
                         "layer_types": [*["sliding_attention"] * 3, "full_attention"]}),
    "Phi-3-mini": ("phi3", {"sliding_window": 8, "rope_parameters": ROPE}),
    "Phi-4-mini": ("phi3", {"sliding_window": None, "rope_parameters": LONGROPE,
                            "original_max_position_embeddings": 128,
                            "partial_rotary_factor": 0.75, "tie_word_embeddings": True}),
    "Gemma-2": ("gemma2", {**GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0,
                           "layer_types": ["sliding_attention", "full_attention"] * 2}),
    "Gemma-3": ("gemma3_text", {**GEMMA, "rope_parameters": {
        "sliding_attention": ROPE,
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}},
        "layer_types": [*["sliding_attention"] * 3, "full_attention"]}),
    "Command R7B": ("cohere2", {"sliding_window": 8, "logit_scale": 0.25,
                                "layer_types": [*["sliding_attention"] * 3, "full_attention"]}),
    "GLM-4": ("glm4", {"head_dim": 8, "partial_rotary_factor": 0.5}),
    "Qwen3-MoE": ("qwen3_moe", {**EXPERTS, "head_dim": 8}),
    "OLMoE": ("olmoe", {**EXPERTS}),
    "GPT-2": ("gpt2", {"num_key_value_heads": 4, "n_positions": 512}),
    "gpt-oss": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8,
                            "sliding_window": 8}),
    "Qwen3.5": ("qwen3_5_text", {"head_dim": 8, "linear_num_value_heads": 4,
                                 "linear_num_key_heads": 2, "linear_key_head_dim": 8,
                                 "linear_value_head_dim": 8, "layer_types": [
                                     *["linear_attention"] * 3, "full_attention"]}),
}  # fmt: skip


def make_family(name, scale=8, seed=0, **overrides):
    """A random model of this family whose weights are `scale` times what they start with, so that
    distributions are far from uniform and whatever is computed otherwise shows."""
    model_type, fields = FAMILIES[name]
    config = AutoConfig.for_model(model_type, **{**SIZES, **fields, **overrides})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
            else:  # norms and biases start as zeros and ones
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model
