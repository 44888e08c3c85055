"""Embeddings, norms and gated MLPs that keep less: the same values and gradients."""

import pytest
import torch
from conftest import FAMILIES, make_model
from torch.autograd import gradcheck

from training.lean_layers import RMSNorm, SwiGLU, make_lean
from training.logprobs import token_logprobs


@pytest.mark.parametrize("family", FAMILIES)
def test_lean_layers_compute_what_the_models_own_do(family):
    ids = torch.randint(100, (2, 9), generator=torch.Generator().manual_seed(0))
    results = []
    for lean in (False, True):
        model = make_model(family)
        if lean:
            make_lean(model)
        logits = model(ids).logits
        logits.square().sum().backward()
        results.append([logits.detach(), *(p.grad for p in model.parameters())])
    for own, lean in zip(*results):
        assert (own - lean).norm() <= 1e-5 * own.norm()


def test_a_norm_of_bf16_numbers_is_in_the_precision_of_its_weights():
    model = make_model()
    norm, x = model.get_decoder().norm, torch.randn(3, 32).bfloat16()
    own = norm(x)
    make_lean(model)
    assert norm(x).dtype == own.dtype == torch.float32
    assert (norm(x) - own).abs().max() < 0.02  # theirs rounds to bf16 before the weights


def test_gradients_are_those_of_finite_differences():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 3, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    weight = torch.randn(5, dtype=torch.float64, generator=generator)
    inputs = [tensor.requires_grad_() for tensor in (x, y, weight)]
    assert gradcheck(lambda x, weight: RMSNorm.apply(x, weight, 1e-3), inputs[::2])
    assert gradcheck(SwiGLU.apply, inputs[:2])


def test_lean_layers_keep_a_quarter_less_for_the_backward_pass():
    def kept(lean):
        model, sizes = make_model(), {}
        if lean:
            make_lean(model)

        def note(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            held.append(tensor)  # or another would take its place
            return tensor

        held = list(model.parameters())
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model.get_decoder().layers[0].mlp(torch.zeros(64, model.config.hidden_size))
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        return sum(size for pointer, size in sizes.items() if pointer not in own)

    assert kept(lean=True) <= 0.8 * kept(lean=False)


@pytest.mark.parametrize("padding_idx", [None, 7])
def test_gradients_add_up_over_passes(padding_idx):
    """Of a tied matrix, whose gradient comes from the embedding and from the head: what a pass adds
    to what is there already, and what it gives where nothing is, as torch has it."""

    def after(ours, *passes):
        model = make_model(dtype=torch.float64, tie_word_embeddings=True)
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        embedding.padding_idx = padding_idx
        if ours:
            make_lean(model)
        for ids in passes:
            hidden = model.get_decoder()(ids[:, :-1]).last_hidden_state.flatten(0, 1)
            following = ids[:, 1:].flatten()
            if ours:
                logprobs, _ = token_logprobs(model, hidden, following, 0.7)
            else:
                logprobs = (head(hidden) / 0.7).log_softmax(-1)[range(len(hidden)), following]
            logprobs.square().sum().backward()
        return embedding.weight.grad

    passes = torch.randint(5, 12, (2, 3, 9), generator=torch.Generator().manual_seed(0))
    assert 7 in passes[0] and 7 in passes[1]
    for some in (passes, passes[:1], passes[1:]):
        expected = after(False, *some)
        assert (after(True, *some) - expected).norm() <= 1e-12 * expected.norm()


def test_an_embedding_that_is_frozen_has_no_gradient():
    model = make_model()
    make_lean(model)
    embedding = model.get_input_embeddings()
    embedding.weight.requires_grad_(False)
    assert not embedding(torch.tensor([[1, 2]])).requires_grad
    model(torch.tensor([[1, 2]])).logits.sum().backward()
    assert embedding.weight.grad is None


@pytest.mark.parametrize("option", ["scale_grad_by_freq", "max_norm"])
def test_an_embedding_with_options_stays_torchs(option):
    results = []
    for lean in (False, True):
        model = make_model()
        embedding = model.get_input_embeddings()
        setattr(embedding, option, 0.1 if option == "max_norm" else True)
        if lean:
            make_lean(model)
        embedding(torch.tensor([[1, 2, 2]])).square().sum().backward()
        results.append((embedding.weight.detach().clone(), embedding.weight.grad))
    assert all(torch.equal(*pair) for pair in zip(*results))
