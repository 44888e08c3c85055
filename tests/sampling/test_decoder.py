"""The decoder, written out by hand, against the model's own forward pass."""

import pytest
import torch
import torch.nn.functional as F
from conftest import FAMILIES, make_model

from sampling.decoder import Decoder, attended, left_padded

PROMPTS = [[5, 9, 3, 7, 7], [5, 9, 8], [5, 9, 3, 1, 30, 22, 4, 11]]  # 5 9 in common, then unequal
VARIANTS = [
    *({"family": family} for family in FAMILIES),
    {"family": "qwen3", "head_dim": 24, "tie_word_embeddings": False},
    {"family": "llama", "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
    {
        "family": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
]


def next_logits(model, rows):
    """What the model says comes after each list of ids, one plain forward pass per list."""
    return torch.stack([model(torch.tensor([ids])).logits[0, -1] for ids in rows])


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_step_gives_the_model_s_own_logits(variant):
    """Through the prompts, and while rows and whole questions drop out between the steps."""
    model = make_model(dtype=torch.float64, vocab_size=40, **variant)
    for parameter in model.parameters():  # biases and norms start as zeros and ones
        parameter.add_(0.1 * torch.randn_like(parameter))
    decoder = Decoder(model, group_size=2, max_new_tokens=6, shares=False)
    rows = [list(prompt) for prompt in PROMPTS for _ in range(2)]
    logits, row = decoder.prefill(PROMPTS)
    assert row.tolist() == list(range(6))
    dropped = {1: [0, 5], 2: [1], 3: [0, 2]}  # of the rows as they stand; then question 0 is gone
    for step in range(5):
        assert (logits - next_logits(model, rows)).abs().max() < 1e-5  # transformers norms in fp32
        tokens = torch.randint(40, (len(rows),), generator=torch.Generator().manual_seed(step))
        if step in dropped:
            alive = torch.ones(len(rows), dtype=torch.bool)
            alive[dropped[step]] = False
            left = alive.nonzero()[:, 0].numpy()
            place = decoder.branch(left)
            assert sorted(place.tolist()) == list(range(len(left)))
            order = left[place.argsort()]
            rows, tokens = [rows[i] for i in order], tokens[order]
        logits = decoder.step(tokens)
        rows = [[*ids, int(token)] for ids, token in zip(rows, tokens)]
    assert len(rows) == 1 and len(decoder.prompt_bias) == 1


@torch.no_grad()
def test_what_all_prompts_begin_with_is_computed_once():
    model = make_model(vocab_size=40)
    shapes = []
    model.get_decoder().embed_tokens.register_forward_hook(
        lambda module, inputs, output: shapes.append(tuple(inputs[0].shape))
    )
    Decoder(model, group_size=4, max_new_tokens=1).prefill(PROMPTS)
    assert shapes == [(1, 2), (3, 6)]  # not 12 rows of 8


@torch.no_grad()
@pytest.mark.parametrize("prompts", [[[3]], [[3], [3]], [[3, 4], [3, 4]], [[1], [2, 3, 4]]])
def test_prompts_that_share_everything_or_nothing(prompts):
    model = make_model(dtype=torch.float64, vocab_size=40)
    logits, _ = Decoder(model, group_size=1, max_new_tokens=1).prefill(prompts)
    assert (logits - next_logits(model, prompts)).abs().max() < 1e-5  # transformers norms in fp32


@pytest.mark.parametrize("values_dtype", [torch.float64, torch.float32], ids=["kernel", "by_hand"])
def test_attention_in_two_parts_is_attention(values_dtype):
    """fp64 takes the fused kernel; mixed precision, as on a GPU, the version by hand."""
    generator = torch.Generator().manual_seed(0)
    q, keys, values = (
        torch.randn(2, 3, length, 8, dtype=torch.float64, generator=generator)
        for length in (4, 11, 11)
    )
    bias = torch.zeros(2, 1, 1, 7, dtype=torch.float64)
    bias[1, ..., :3] = -torch.inf  # left padding
    values = values.to(values_dtype)
    first, log_first = attended(q, keys[:, :, :7], values[:, :, :7], bias)
    second, log_second = attended(q, keys[:, :, 7:], values[:, :, 7:])
    merged = torch.lerp(second, first, torch.sigmoid(log_first - log_second).to(values_dtype))
    mask = F.pad(bias, (0, 4))
    expected = F.scaled_dot_product_attention(q, keys, values.double(), attn_mask=mask)
    assert (merged - expected).abs().max() < (1e-12 if values_dtype == torch.float64 else 1e-6)


def test_padding_stands_on_the_left():
    ids, mask = left_padded([[4, 5], [6]], "cpu")
    assert ids.tolist() == [[4, 5], [0, 6]]
    assert mask.tolist() == [[True, True], [False, True]]
