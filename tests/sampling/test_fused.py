"""The fused step against the one that it replaces. Where there is no GPU, Triton interprets it (see
conftest.py)."""

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, make_model
from torch.utils._python_dispatch import TorchDispatchMode
from toys import Words, seeds

from sampling import cuda_graph
from sampling.decoder import Decoder, rotated
from sampling.groups import sample_rollouts
from utils import UserError

# Torch for CPUs comes without triton: pip install triton
fused = pytest.importorskip("sampling.fused", reason="triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPTS = [[5, 9, 3], [5, 9], [5, 9, 1, 3, *range(40)]]  # more than one block of keys
VARIANTS = [
    {"family": "qwen2"},
    {"family": "qwen3", "head_dim": 24},
    {"family": "llama", "attention_bias": True, "tie_word_embeddings": False},
    {"family": "llama", "num_key_value_heads": 1, "mlp_bias": True},
]


class Direct:
    """In the place of a CUDA graph: calls the function again."""

    def __init__(self, function):
        self.replay = function


def changed(**variant):
    """A toy model whose biases and norms are not those it started with, zeros and ones."""
    model = make_model(vocab_size=50, **variant).to(DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.empty_like(parameter).normal_(generator=generator)
    return model


def random(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE)


@torch.inference_mode()
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_step_gives_the_logits_of_the_plain_decoder(variant):
    """While rows and a whole question drop out between the steps."""
    model = changed(num_hidden_layers=1, **variant)
    plain = Decoder(model, 2, 8, shares=False)
    ours = fused.FusedDecoder(model, 2, 8, Direct)
    for decoder in (plain, ours):
        decoder.prefill(PROMPTS)
    rows = len(PROMPTS) * 2
    for left in ([0, 3, 5], [1]):
        tokens = torch.arange(rows, device=DEVICE) + 7
        assert (plain.step(tokens) - ours.step(tokens)).abs().max() < 1e-4
        assert plain.branch(np.array(left)).tolist() == ours.branch(np.array(left)).tolist()
        rows = len(left)
    assert (plain.step(tokens[:1]) - ours.step(tokens[:1])).abs().max() < 1e-4


def sample(model, tokens, recorders, fused):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_graph, "RECORDERS", recorders)
        return sample_rollouts(model, Words(0), PROMPTS, 2, tokens, 1.0, seeds(0), fused=fused)


def assert_same(model, tokens, recorders):
    one, other = (sample(model, tokens, recorders, way) for way in (True, False))
    assert torch.equal(one.completion_ids, other.completion_ids)
    assert torch.equal(one.completion_mask, other.completion_mask)
    assert (one.logprobs - other.logprobs).abs().max() < 1e-4


def test_samples_are_those_of_the_step_that_is_replaced():
    assert_same(changed(num_hidden_layers=1), 4, {DEVICE: Direct})


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_on_a_gpu_recorded_kernels_write_the_same(variant):
    assert_same(changed(**variant), 200, cuda_graph.RECORDERS)


@torch.inference_mode()
def test_under_autocast_the_step_has_its_precision():
    model = changed(num_hidden_layers=1)
    with torch.autocast(DEVICE, torch.bfloat16):
        plain = Decoder(model, 1, 4, shares=False)
        ours = fused.FusedDecoder(model, 1, 4, Direct)
        for decoder in (plain, ours):
            decoder.prefill(PROMPTS)
        tokens = torch.arange(3, device=DEVICE)
        assert (ours.dtype, ours.values[0].dtype) == (torch.bfloat16, torch.bfloat16)
        expected, logits = plain.step(tokens), ours.step(tokens)
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().max() < 0.05 * expected.std()


def test_a_token_attends_to_its_prompt_and_to_its_completion():
    """More of both than a block of keys, and nothing behind what is written."""
    rows, kv_heads, share, size, longest, capacity, now = 3, 2, 3, 16, 40, 60, 37
    heads = kv_heads * share
    joint = random(rows, (heads + 2 * kv_heads) * size)
    cos, sin = random(rows, size), random(rows, size + 1)[:, :size].contiguous()
    prompt_keys = random(2, longest, kv_heads, size).transpose(1, 2)
    prompt_values = random(2, kv_heads, longest, size)
    keys, values = random(rows, kv_heads, capacity, size), random(kv_heads, rows, capacity, size)
    values = values.transpose(0, 1).contiguous()
    question = torch.tensor([1, 0, 1], device=DEVICE)
    bias = torch.zeros(2, 1, 1, longest, device=DEVICE)
    bias[0, ..., 4:30] = -torch.inf
    written = torch.tensor([now], device=DEVICE)
    expected_keys, expected_values = keys.clone(), values.clone()
    out = fused.attend(
        joint, (cos, sin), (prompt_keys, prompt_values, bias, question), (keys, values, written),
        None,
    )  # fmt: skip

    parts = joint.view(rows, 1, -1, size)
    turned = rotated(parts[:, :, : heads + kv_heads], cos[:, None, None], sin[:, None, None])[:, 0]
    expected_keys[:, :, now] = turned[:, heads:]
    expected_values[:, :, now] = parts[:, 0, heads + kv_heads :]
    assert (keys - expected_keys).abs().max() < 1e-5 and torch.equal(values, expected_values)
    for row, asked in enumerate(question.tolist()):
        visible = bias[asked, 0, 0] == 0
        k = torch.cat([prompt_keys[asked][:, visible], keys[row, :, : now + 1]], dim=1)
        v = torch.cat([prompt_values[asked][:, visible], values[row, :, : now + 1]], dim=1)
        q = turned[row, :heads].unflatten(0, (kv_heads, share))
        expected = F.scaled_dot_product_attention(q, k, v).flatten()
        assert (out[row] - expected).abs().max() < 1e-5


def test_norms_and_activations_are_torch_s():
    x, y, norm = random(3, 40), random(3, 41)[:, :40].contiguous(), random(40)
    summed = x + y
    module = SimpleNamespace(weight=norm, variance_epsilon=1e-3)
    normed = fused.add_norm(x, y, module, torch.float32)
    assert (x - summed).abs().max() < 1e-6
    assert (normed - F.rms_norm(summed, (40,), norm, 1e-3)).abs().max() < 1e-5
    both = random(2, 2 * 1100)  # more than a block of columns
    gate, up = both.chunk(2, dim=-1)
    assert (fused.gated(both) - F.silu(gate) * up).abs().max() < 1e-5


class Launches(TorchDispatchMode):
    """Counts what would be a kernel on a GPU: every operation that is no view and no allocation."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returns = [value.alias_info for value in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returns)
        if not is_view and "empty" not in func.__name__:
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
@pytest.mark.parametrize("variant", VARIANTS[:2], ids=str)
def test_a_layer_is_eight_kernels(variant, monkeypatch):
    counts = []
    for layers in (1, 2):
        decoder = fused.FusedDecoder(changed(num_hidden_layers=layers, **variant), 1, 4, Direct)
        decoder.prefill(PROMPTS)
        launches = Launches()
        for name in ("_add_norm", "_gated", "_attend"):  # the rest is seen by the dispatcher
            noted = Noted(name, getattr(fused, name), launches.names)
            monkeypatch.setattr(fused, name, noted)
        with launches:
            decoder._one_token()
        monkeypatch.undo()
        counts.append(len(launches.names))
    assert counts[1] - counts[0] == 8


class Noted:
    """A kernel whose launches are noted. What it does inside is its own: it is one on a GPU."""

    def __init__(self, name, kernel, names):
        self.name, self.kernel, self.names = name, kernel, names

    def __getitem__(self, grid):
        def launch(*args, **settings):
            before = len(self.names)
            self.kernel[grid](*args, **settings)
            self.names[before:] = [self.name]

        return launch


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from sampling import fused

def built(kernel, tensors, whole_numbers=(), constants={}):
    types = {name: f"*{dtype}" for dtype, names in tensors.items() for name in names}
    types |= {name: "i32" for name in whole_numbers} | {"epsilon": "fp32"}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    options = {"num_warps": 8, "num_stages": 2}
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)

strides = [f"{kind}_{axis}" for kind in ("keys", "values") for axis in "qkp"]
for capability, dtype in ((75, "fp16"), (80, "bf16"), (90, "bf16")):
    built(fused._add_norm, {"fp32": ["x", "weight"], dtype: ["y", "out"]}, (),
          {"SIZE": 1536, "ROOM": 2048})
    built(fused._gated, {dtype: ["gate_up", "out"]}, (), {"SIZE": 8960, "COLUMNS": fused.COLUMNS})
    attend = built(
        fused._attend,
        {"fp32": ["cos", "sin", "query_norm", "key_norm", "prompt_keys", "bias", "keys"],
         dtype: ["joint", "prompt_values", "values", "out"], "i64": ["question", "written"]},
        [*strides, "longest", "capacity"],
        {"KV_HEADS": 2, "SHARE": 6, "SHARE_ROOM": 16, "SIZE": 128, "ROOM": 128,
         "BLOCK": fused.BLOCK},
    )
    print(capability, attend.metadata.shared)
"""


@pytest.mark.slow
def test_the_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    """Down to machine code, for a T4, an A100 and an H100, and fit into the least's 64 KiB."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    shared = dict(line.split() for line in done.stdout.splitlines())
    assert list(shared) == ["75", "80", "90"]
    assert max(map(int, shared.values())) <= 64 * 1024


def test_another_activation_is_refused():
    with pytest.raises(UserError, match="--sampler fused: knows the activation silu"):
        fused.FusedDecoder(make_model(hidden_act="gelu"), 2, 4, Direct)
