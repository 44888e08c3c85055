"""Linear layers, embeddings, norms and gated MLPs of ours: the same values and gradients."""

import pytest
import torch
from conftest import FAMILIES, make_model
from torch.autograd import gradcheck
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from training import lean_layers
from training.lean_layers import RMSNorm, SwiGLU, make_lean, product
from training.logprobs import token_logprobs


@pytest.mark.parametrize("passes", [1, 2])  # the second adds its gradient to what is there
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("by_onednn", [True, False])
def test_lean_layers_compute_what_the_models_own_do(by_onednn, family, passes, monkeypatch):
    monkeypatch.setattr(lean_layers, "onednn_is_faster", lambda: by_onednn)
    ids = torch.randint(100, (passes, 2, 9), generator=torch.Generator().manual_seed(0))
    results = []
    for lean in (False, True):
        model = make_model(family)
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):  # 0 at first, and nobody would miss them
                torch.nn.init.normal_(parameter)
        if lean:
            make_lean(model)
        for read in ids:
            logits = model(read).logits
            logits.square().sum().backward()
        results.append([logits.detach(), *(p.grad for p in model.parameters())])
    for own, lean in zip(*results):
        assert (own - lean).norm() <= 1e-5 * own.norm()


@pytest.mark.parametrize("shape", [(7,), (1, 5), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("by_onednn", [True, False])
def test_a_product_is_that_of_a_linear_layer_whatever_the_strides(
    by_onednn, shape, dtype, monkeypatch
):
    monkeypatch.setattr(lean_layers, "onednn_is_faster", lambda: by_onednn)
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    weight, tolerance = random(17, 33), 4 * torch.finfo(dtype).eps
    wide, tall = random(*shape, 40), random(33, *shape)
    for x in (
        random(*shape, 33),
        wide[..., :33],
        tall.movedim(0, -1),
        random(33).expand(*shape, 33),
    ):
        for w in (weight, random(33, 17).T, random(17, 40)[:, :33]):
            for bias in (None, random(17)):
                expected = linear(*(None if t is None else t.double() for t in (x, w, bias)))
                off = (product(x, w, bias) - expected).norm()
                assert off <= tolerance * expected.norm()


class Products(TorchDispatchMode):
    """Which matrix products are computed: oneDNN's, or those of torch's own."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_", "_linear_pointwise"):
            self.names.append("mm" if name == "addmm" else name)  # with a bias or without
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize(("capability", "name"), [("AVX512", "_linear_pointwise"), ("AVX2", "mm")])
def test_the_faster_library_multiplies_in_both_directions(capability, name, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    model = make_model()
    make_lean(model)
    layers = 7 * model.config.num_hidden_layers
    x = torch.randn(1, 9, model.config.hidden_size, requires_grad=True)
    with Products() as forward:
        hidden = model.get_decoder()(inputs_embeds=x).last_hidden_state
    assert forward.names == layers * [name]
    with Products() as backward:
        hidden.sum().backward()
    assert sorted(backward.names) == sorted(layers * [name] + layers * ["mm"])
    with Products() as again:
        model.get_decoder()(inputs_embeds=x).last_hidden_state.sum().backward()
    assert sorted(again.names) == sorted(2 * layers * [name] + layers * ["addmm_"])


def test_under_autocast_linear_layers_are_in_its_precision():
    model = make_model()
    layer, x = model.get_decoder().layers[0].mlp.up_proj, torch.randn(3, 32)
    with torch.autocast("cpu", torch.bfloat16):
        own = layer(x)
        make_lean(model)
        assert layer(x).dtype == own.dtype == torch.bfloat16
        assert torch.equal(layer(x), own)


def test_a_linear_layer_that_is_frozen_hands_the_gradient_on():
    model = make_model()
    make_lean(model)
    layer, x = model.get_decoder().layers[0].mlp.up_proj, torch.randn(3, 32, requires_grad=True)
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert (x.grad - layer.weight.sum(0)).abs().max() < 1e-5


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
