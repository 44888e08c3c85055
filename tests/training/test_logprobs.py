"""Log-probabilities and entropies of tokens, and their gradients, against naive ones."""

import math

import pytest
import torch
from conftest import FAMILIES, make_model
from toys import COMPLETIONS, PROMPT, group_logprobs, naive_logprobs

from training.logprobs import TokenLogprobs, token_logprobs


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_shared_prefix_equals_full_sequences_in_value_and_gradient(family, tied):
    model = make_model(family, torch.float64, tie_word_embeddings=tied, use_cache=tied)
    weights = torch.randn(3, 5, dtype=torch.float64)

    def run(function):
        model.zero_grad()
        logprobs = function(model, PROMPT, COMPLETIONS, 0.7)
        (logprobs * weights).sum().backward()
        return logprobs.detach(), [p.grad.clone() for p in model.parameters()]

    shared, shared_gradients = run(group_logprobs)
    full, full_gradients = run(naive_logprobs)
    assert (shared - full).abs().max() < 1e-12
    for ours, theirs in zip(shared_gradients, full_gradients):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_a_completion_of_one_token_is_scored_by_the_prompt_alone():
    model = make_model(dtype=torch.float64)
    expected = naive_logprobs(model, PROMPT, COMPLETIONS[:, :1], 1.0)
    actual = group_logprobs(model, PROMPT, COMPLETIONS[:, :1], 1.0)
    assert (actual - expected).abs().max() < 1e-12


def test_chunks_change_neither_logprobs_nor_gradients(monkeypatch):
    model = make_model(dtype=torch.float64)

    def run(chunk):
        monkeypatch.setattr("training.logprobs.LOGPROB_CHUNK", chunk)
        model.zero_grad()
        logprobs = group_logprobs(model, PROMPT, COMPLETIONS, 1.0)
        logprobs.sum().backward()
        return logprobs, [p.grad.clone() for p in model.parameters()]

    whole, gradients = run(1024)
    for chunk in (1, 4, 7):
        logprobs, chunked = run(chunk)
        assert (logprobs - whole).abs().max() < 1e-12
        assert all((a - b).norm() <= 1e-5 * b.norm() for a, b in zip(chunked, gradients))


def head_step(temperature, trained_head=True):
    """Log-probs of 9 tokens and the gradients to hidden states and head, by hand and by torch."""
    model = make_model(dtype=torch.float64)
    weight = model.get_output_embeddings().weight.requires_grad_(trained_head)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 32, dtype=torch.float64, generator=generator)
    ids = torch.randint(300, (9,), generator=generator)
    upstream = torch.randn(9, dtype=torch.float64, generator=generator)
    results = []
    for by_hand in (True, False):
        leaf = hidden.clone().requires_grad_()
        model.zero_grad()
        if by_hand:
            logprobs, _ = token_logprobs(model, leaf, ids, temperature)
        else:
            logprobs = (leaf @ weight.T / temperature).log_softmax(-1)[torch.arange(9), ids]
        (logprobs * upstream).sum().backward()
        results.append([logprobs.detach(), leaf.grad, weight.grad])
    return results


@pytest.mark.parametrize("chunk", [1, 4, 9, 1024])
@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_log_probs_of_tokens_and_their_gradients_are_those_of_torch(
    chunk, temperature, monkeypatch
):
    monkeypatch.setattr("training.logprobs.LOGPROB_CHUNK", chunk)
    ours, theirs = head_step(temperature)
    for a, b in zip(ours, theirs):
        assert (a - b).abs().max() < 1e-12
    ours, theirs = head_step(temperature, trained_head=False)
    assert ours[2] is theirs[2] is None
    assert (ours[1] - theirs[1]).abs().max() < 1e-12


def test_log_probs_are_fp32_even_under_bf16_autocast():
    model = make_model()
    hidden, ids = torch.randn(4, 32), torch.tensor([1, 2, 3, 4])
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = token_logprobs(model, hidden, ids, 1.0)
    exact, _ = token_logprobs(model, hidden, ids, 1.0)
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, exact)


def test_dropout_in_the_config_does_not_reach_scoring():
    model = make_model("llama", attention_dropout=0.5)
    first = group_logprobs(model, PROMPT, COMPLETIONS, 1.0)
    assert torch.equal(first, group_logprobs(model, PROMPT, COMPLETIONS, 1.0))
    assert math.isfinite(first.sum().item())


@pytest.mark.parametrize("chunk", [1, 4, 1024])
@pytest.mark.parametrize("trained_head", [True, False])
def test_entropies_and_their_gradients_are_those_of_torch(chunk, trained_head, monkeypatch):
    monkeypatch.setattr("training.logprobs.LOGPROB_CHUNK", chunk)
    monkeypatch.setattr("training.logprobs.SOFTMAX_ROWS", 2)
    model = make_model(dtype=torch.float64)
    weight = model.get_output_embeddings().weight.requires_grad_(trained_head)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 32, dtype=torch.float64, generator=generator)
    ids = torch.randint(300, (9,), generator=generator)
    up = torch.randn(2, 9, dtype=torch.float64, generator=generator)
    results = []
    for ours in (True, False):
        leaf = hidden.clone().requires_grad_()
        model.zero_grad()
        if ours:
            logprobs, entropy = token_logprobs(model, leaf, ids, 0.7, with_entropy=True)
        else:
            distribution = torch.distributions.Categorical(logits=leaf @ weight.T / 0.7)
            logprobs, entropy = distribution.log_prob(ids), distribution.entropy()
        (logprobs * up[0] + entropy * up[1]).sum().backward()
        to_weight = weight.grad if trained_head else torch.zeros(1)
        results.append((logprobs.detach(), entropy.detach(), leaf.grad, to_weight))
    for a, b in zip(*results):
        assert (a - b).abs().max() < 1e-11


def test_the_gradients_of_log_probs_and_entropies_are_finite_differences():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in ((3, 4), (6, 4))
    )
    ids = torch.tensor([5, 0, 2])
    assert torch.autograd.gradcheck(
        lambda h, w: TokenLogprobs.apply(h, w, ids, True), (hidden, weight)
    )
