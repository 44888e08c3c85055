"""The gradient's norm: exact for as many numbers as a model has, and what clipping goes by."""

import pytest
import torch

from training.optimizer import clip_gradients


def parameters(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.nn.Parameter(torch.empty(shape)) for shape in shapes]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 1e-3
    return made


@pytest.mark.parametrize(
    "shapes",
    [[(4000, 9000)], [(2**24, 2)], [(7,), (3, 5), (2, 3, 4)], [(1,)], [(20_000, 576), (576,)]],
)
def test_the_norm_is_that_of_fp64(shapes):
    made = parameters(*shapes)
    exact = torch.cat([p.grad.double().flatten() for p in made]).norm().item()
    assert clip_gradients(made, 0).item() == pytest.approx(exact, rel=1e-6)


def test_clipping_scales_to_the_bound_and_leaves_smaller_ones_alone():
    made = parameters((30, 40), (40,))
    before = [p.grad.clone() for p in made]
    norm = clip_gradients(made, 0.0)
    assert all(torch.equal(p.grad, g) for p, g in zip(made, before))
    assert clip_gradients(made, 2 * norm.item()).item() == pytest.approx(norm.item())
    assert all(torch.equal(p.grad, g) for p, g in zip(made, before))
    clip_gradients(made, norm.item() / 4)
    assert all(torch.allclose(p.grad, g / 4, rtol=1e-4) for p, g in zip(made, before))
    assert all(p.grad.dtype == torch.float32 for p in made)


def test_without_gradients_the_norm_is_0():
    assert clip_gradients([torch.nn.Parameter(torch.ones(3))], 1.0).item() == 0


def test_a_gradient_that_is_not_finite_shows_in_the_norm():
    for value in (float("nan"), float("inf")):
        made = parameters((3, 3), (2,))
        made[1].grad[0] = value
        assert not torch.isfinite(clip_gradients(made, 0))
