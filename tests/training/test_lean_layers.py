"""Norms and gated MLPs that keep less: the same values and gradients."""

import pytest
import torch
from conftest import FAMILIES, make_model
from torch.autograd import gradcheck

from training.lean_layers import RMSNorm, SwiGLU, make_lean


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
