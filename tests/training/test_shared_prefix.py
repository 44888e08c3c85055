"""Several groups in one pass: the same as every sequence by itself."""

import pytest
import torch
from conftest import FAMILIES, make_model
from toys import naive_logprobs

from llms import frozen_copy
from training.logprobs import completion_logprobs
from training.shared_prefix import micro_batches

PROMPTS = [torch.tensor(ids) for ids in ([5, 17, 2, 88], [9], [41, 7, 3, 3, 3, 60, 12])]
LENGTHS = torch.tensor([[6, 1, 4], [2, 6, 5], [3, 3, 1]])  # (Q, G)
MASK = torch.arange(6) < LENGTHS[..., None]  # (Q, G, C)
IDS = torch.randint(100, MASK.shape, generator=torch.Generator().manual_seed(0))


def naive(model, temperature=0.7):
    rows = [naive_logprobs(model, p, ids, temperature) for p, ids in zip(PROMPTS, IDS)]
    return torch.stack(rows).where(MASK, 0)  # (Q, G, C)


def packed(model, budget=0, temperature=0.7, mask=MASK):
    """The same through micro-batches, put back in place."""
    result = torch.zeros(9, 6, dtype=torch.float64)
    for batch in micro_batches(PROMPTS, mask.sum(-1).tolist(), budget):
        logprobs, _ = completion_logprobs(model, batch, IDS.flatten(0, 1)[batch.rows], temperature)
        result = result.index_copy(0, batch.rows, logprobs.double())
    return result.view(MASK.shape)


def value_and_gradients(model, function):
    weights = torch.randn(MASK.shape, generator=torch.Generator().manual_seed(1)).double()
    model.zero_grad()
    logprobs = function(model)
    (logprobs * weights).sum().backward()
    return logprobs.detach(), [p.grad.clone() for p in model.parameters()]


def assert_same(ours, theirs, value=1e-12, gradient=1e-5):
    assert (ours[0] - theirs[0]).abs().max() <= value
    assert all((a - b).norm() <= gradient * b.norm() for a, b in zip(ours[1], theirs[1]))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [0, 1, 12, 20])
def test_groups_that_share_a_pass_equal_every_sequence_by_itself(family, budget):
    model = make_model(family, torch.float64)
    expected = value_and_gradients(model, naive)
    assert_same(value_and_gradients(model, lambda m: packed(m, budget)), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_layers_give_the_same_values_and_gradients(family):
    """Also with dropout in the config: checkpointing needs train mode, and nothing may drop out."""
    model = make_model(family, torch.float64, attention_dropout=0.5)
    expected = value_and_gradients(model, packed)
    calls = []
    layer = model.get_decoder().layers[0]
    layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    model.activation_checkpointing_enable()
    model.train()
    assert_same(value_and_gradients(model, packed), expected, gradient=1e-12)
    assert len(calls) == 2  # once forward, once more for the backward pass


def test_completions_left_out_by_the_mask_do_not_run():
    model = make_model(dtype=torch.float64)
    seen = []
    model.get_decoder().embed_tokens.register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0].numel())
    )
    mask = MASK.clone()
    mask[1] = False
    mask[0, 2] = False
    result = packed(model, mask=mask)
    # Two prompts of 4 and 7 tokens, completions of 6, 1 and 3, 3, 1, each less its last token.
    assert seen == [4 + 7 + 5 + 0 + 2 + 2 + 0]
    assert (result[~mask.any(-1)] == 0).all()
    assert (result - naive(model).where(mask, 0)).abs().max() < 1e-12


def test_padded_places_do_not_matter():
    model = make_model(dtype=torch.float64)
    expected = packed(model)
    noise = torch.randint(100, IDS.shape, generator=torch.Generator().manual_seed(2))
    original = IDS.clone()
    try:
        IDS[~MASK] = noise[~MASK]
        assert torch.equal(packed(model), expected)
    finally:
        IDS.copy_(original)


def test_a_group_that_fits_a_pass_of_its_own_is_not_cut():
    prompts = [torch.zeros(10, dtype=torch.long)] * 3
    batches = micro_batches(prompts, [[20, 20], [20, 20], [60, 60]], 80)
    assert [batch.rows.tolist() for batch in batches] == [[1, 0], [3, 2], [5], [4]]


@pytest.mark.parametrize("budget", [0, 1, 8, 12, 20, 1000])
def test_micro_batches_hold_every_completion_once_and_keep_to_the_budget(budget):
    batches = micro_batches(PROMPTS, LENGTHS.tolist(), budget)
    rows = torch.cat([batch.rows for batch in batches]).tolist()
    assert sorted(rows) == list(range(9))
    for batch in batches:
        tokens = sum(map(len, batch.prompts)) + sum(batch.lengths)
        assert budget == 0 or tokens <= budget or len(batch.rows) == 1
        for row, length, question in zip(batch.rows.tolist(), batch.lengths, batch.question):
            assert length == LENGTHS.flatten()[row]
            assert batch.prompts[question] is PROMPTS[row // 3]
        assert len(batch.prompts) == len(set(batch.question))
    assert len(batches) == {0: 1, 1: 9, 1000: 1}.get(budget, len(batches))


def test_a_group_that_is_cut_keeps_long_completions_together():
    batches = micro_batches(PROMPTS[:1], [[1, 8, 2, 7]], 19)
    lengths = [batch.lengths for batch in batches]
    assert lengths == [[8, 7], [2, 1]]


def test_one_long_completion_does_not_pad_a_pass_full_of_short_ones():
    prompts = [torch.tensor([1, 2, 3])] * 4
    lengths = [[300, *[10] * 31], *[[10] * 32] * 3]
    batches = micro_batches(prompts, lengths, 1000)
    assert sum(len(batch.rows) for batch in batches) == 128
    for batch in batches:
        assert len(batch.rows) * max(batch.lengths) <= 2000
    assert len(batches) <= 4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bf16_reference_under_autocast_is_exactly_the_fp32_one_under_autocast(family):
    model = make_model(family)
    small = frozen_copy(model, torch.bfloat16)
    dtypes = {p.dtype for p in small.parameters()}
    assert dtypes == {torch.bfloat16, torch.float32}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(packed(small), packed(frozen_copy(model)))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_without_a_packing_the_attention_is_the_model_s_own():
    """The model still generates and runs on padded batches once it has been trained."""
    model = make_model(dtype=torch.float64)
    ids = torch.randint(100, (2, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    expected = model(ids, attention_mask=mask).logits
    packed(model)
    assert model.config._attn_implementation == "shared_prefix"
    assert torch.equal(model(ids, attention_mask=mask).logits, expected)


def test_a_group_without_anything_to_train_on_ends_no_pass():
    prompts, lengths = [torch.ones(4).long()] * 3, [[3, 3], [0, 0], [3, 3]]
    assert len(micro_batches(prompts, lengths, 10)) == 2
    assert len(micro_batches(prompts, lengths, 20)) == 1
    long = [prompts[0], torch.ones(15).long(), prompts[2]]
    assert len(micro_batches(long, lengths, 20)) == 1
