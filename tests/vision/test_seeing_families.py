"""Five families that see: sampler and training pass against transformers' own forward."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from sighted import PLACEHOLDER, SIGHTED, forward_logprobs, image, make_sighted, prompt_with
from toys import Words, seeds

from sampling import decoder
from sampling.groups import sample_rollouts
from training.lean_layers import make_lean
from training.logprobs import completion_logprobs
from training.lora import freeze_tower, trained_parameters
from training.shared_prefix import micro_batches

NONE, ONE, OTHER_SIZE = [], [image(64, 48, 1)], [image(40, 60, 2)]
TWO = [image(32, 64, 3), image(50, 30, 4)]
BATCHES = {
    "no picture": [NONE, NONE],
    "one each, of different size": [ONE, OTHER_SIZE],
    "two in one prompt, none in another": [TWO, NONE, ONE],
}
TEXTS = ([5, 6, 17, 2], [5, 6, 88, 41, 7], [5, 6, 9])


def prompts_of(model, reader, batch):
    pairs = [prompt_with(model, reader, text, images) for text, images in zip(TEXTS, batch)]
    return [list(part) for part in zip(*pairs)]


def sampled(model, prompts, pictures, temperature=1.0):
    return sample_rollouts(model, Words(0), prompts, 3, 6, temperature, seeds(), pictures=pictures)


def trained(model, rollouts, budget=0):
    """The training pass's log-probs, (Q, G, C)."""
    ids = rollouts.completion_ids.flatten(0, 1)
    lengths = rollouts.completion_mask.sum(-1).tolist()
    batches = micro_batches(rollouts.prompt_ids, lengths, budget, ids, rollouts.pictures)
    logprobs = torch.zeros_like(ids, dtype=model.dtype)
    for batch in batches:
        logprobs[batch.rows], _ = completion_logprobs(model, batch, ids[batch.rows], 1.0)
    return logprobs.view_as(rollouts.completion_ids)


def errors(family, batch, change=lambda pictures: pictures):
    """Largest differences (sampler, training pass) to transformers' forward, in nats."""
    model, reader = make_sighted(family)
    plain = copy.deepcopy(model)
    prompts, pictures = prompts_of(model, reader, batch)
    rollouts = sampled(model, prompts, change(pictures))
    ours = trained(model, rollouts)
    worst = [0.0, 0.0]
    for q, images in enumerate(batch):
        lengths = rollouts.completion_mask[q].sum(-1).tolist()
        # transformers' own forward takes no placeholder that shows nothing.
        found = (rollouts.completion_ids[q] == PLACEHOLDER).int()  # (G, C)
        lengths = [min(n, f.argmax().item()) if f.any() else n for n, f in zip(lengths, found)]
        rows = [row[:n].tolist() for row, n in zip(rollouts.completion_ids[q], lengths)]
        with torch.no_grad():
            expected = forward_logprobs(plain, reader, prompts[q], images, rows)
        for i, logprobs in enumerate((rollouts.logprobs[q], ours[q])):
            for row, n, reference in zip(logprobs, lengths, expected):
                worst[i] = max(worst[i], (row[:n] - reference).abs().max().item())
    return worst


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("family", SIGHTED)
def test_sampler_and_training_pass_are_transformers_forward(family, batch):
    assert max(errors(family, BATCHES[batch])) < 2e-5


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_positions_of_one_dimension_are_noticed(family):
    """Sampler and trainer are then wrong alike: only transformers' own forward tells."""
    wrong = errors(family, [ONE, OTHER_SIZE], lambda ps: [replace(p, positions=None) for p in ps])
    assert min(wrong) > 0.01


def test_a_common_prefix_that_goes_on_over_placeholders_cannot_be_read(monkeypatch):
    """Two pictures have equal placeholders; what is shown there would have no place of its own."""
    monkeypatch.setattr(decoder, "first_place", lambda pictures: np.inf)
    with pytest.raises(IndexError):
        errors("llava", [ONE, OTHER_SIZE])


@pytest.mark.parametrize("family", SIGHTED)
def test_features_in_the_wrong_order_are_noticed(family):
    def turned(pictures):
        return [replace(p, features=p.features.flip(0)) for p in pictures]

    assert min(errors(family, [TWO, ONE], turned)) > 0.01


@pytest.mark.parametrize("family", SIGHTED)
def test_the_packed_gradient_is_that_of_the_plain_forward(family):
    model, reader = make_sighted(family, torch.float64)
    freeze_tower(model)
    make_lean(model)  # transformers' norms round to fp32
    plain = copy.deepcopy(model)
    prompts, pictures = prompts_of(model, reader, [TWO, ONE])
    rollouts = sampled(model, prompts, pictures)
    ids = rollouts.completion_ids.clamp(max=PLACEHOLDER - 5)
    rollouts = replace(rollouts, completion_ids=ids)
    (trained(model, rollouts, budget=60) * rollouts.completion_mask).sum().backward()
    total = 0
    for q, images in enumerate([TWO, ONE]):
        lengths = rollouts.completion_mask[q].sum(-1).tolist()
        rows = [row[:n].tolist() for row, n in zip(ids[q], lengths)]
        total = total + sum(
            row.sum() for row in forward_logprobs(plain, reader, prompts[q], images, rows)
        )
    total.backward()
    pairs = list(zip(trained_parameters(model), trained_parameters(plain)))
    assert pairs
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-8)
    trained_ones = {id(ours) for ours, _ in pairs}
    assert all(p.grad is None for p in model.parameters() if id(p) not in trained_ones)
