"""The compiled step against the eager one: the same completions, compiled once for all batches."""

import gc
import shutil

import pytest
import torch
from conftest import make_model
from toys import Words, group_logprobs, seeds

from sampling import cuda_graph
from sampling.compiled import DECODERS
from sampling.groups import sample_rollouts

VARIANTS = [
    {"family": "qwen2"},
    {"family": "qwen3"},
    {"family": "llama", "attention_bias": True, "tie_word_embeddings": False},
]


@pytest.fixture
def graphs(monkeypatch):
    """Every graph that gets compiled. They run as traced: inductor has a test of its own."""
    compiled = []

    def backend(graph, example_inputs):
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr("sampling.compiled.COMPILER", {"cpu": {"backend": backend}})
    monkeypatch.setattr(cuda_graph, "SHORTEST", 16)
    return compiled


def sample(model, prompts, compiled, seed=0, tokens=30):
    return sample_rollouts(model, Words(0), prompts, 4, tokens, 1.0, seeds(seed), compiled=compiled)


def assert_same(model, prompts, **settings):
    """Returns the completions' lengths."""
    eager, compiled = (sample(model, prompts, way, **settings) for way in (False, True))
    assert torch.equal(eager.completion_ids, compiled.completion_ids)
    assert torch.equal(eager.completion_mask, compiled.completion_mask)
    assert torch.equal(eager.finished, compiled.finished)
    assert (eager.logprobs - compiled.logprobs).abs().max() < 1e-4
    return eager.completion_mask.sum(-1)


@torch.no_grad()
def change(model):
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_compiled_and_eager_write_the_same_and_new_weights_need_no_new_graph(variant, graphs):
    model = make_model(vocab_size=20, **variant)
    change(model)  # biases and norms start as zeros and ones
    lengths = assert_same(model, [[5, 9, 3], [8], [7, 7, 1, 3]])
    assert len(lengths.unique()) > 3  # rows finish at different times
    assert len(graphs) == 2  # the cache's first 16 tokens, and all 30
    before = sample(model, [[5, 9], [8, 2, 2], [7, 7, 1, 3, 4]], True, seed=1)
    change(model)
    assert_same(model, [[5, 9], [8, 2, 2], [7, 7, 1, 3, 4]], seed=1)
    after = sample(model, [[5, 9], [8, 2, 2], [7, 7, 1, 3, 4]], True, seed=1)
    assert not torch.equal(before.logprobs[..., 0], after.logprobs[..., 0])
    assert len(graphs) == 2


def test_all_that_a_graph_reads_but_the_tokens_stays_where_it_is(graphs):
    """A CUDA graph would copy any other input to its place at every token."""
    model = make_model("qwen3", vocab_size=20)
    sample(model, [[5, 9, 3]], True, tokens=5)
    [graph] = graphs
    inputs = graph.graph.find_nodes(op="placeholder")
    moving = [
        tuple(node.meta["example_value"].shape)
        for node in inputs
        if "_dynamo_static_input_type" not in node.meta["tensor_dict"]
    ]
    assert len(inputs) > 20 and moving == [(4,)]


def test_under_autocast_the_compiled_step_has_its_precision_and_does_the_same(graphs):
    model = make_model(vocab_size=20, initializer_range=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(model, [[5, 9, 3], [8]], tokens=10)
    assert DECODERS[model].dtype == torch.bfloat16
    sample(model, [[5, 9, 3], [8]], True, tokens=1)
    assert DECODERS[model].dtype == torch.float32


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a compiler")
def test_inductor_writes_the_same(monkeypatch):
    plain = {"options": {"cpp.vec_isa_ok": False}}  # to find out what the CPU has takes seconds
    monkeypatch.setattr("sampling.compiled.COMPILER", {"cpu": plain})
    monkeypatch.setattr(cuda_graph, "SHORTEST", 16)
    model = make_model(vocab_size=20, num_hidden_layers=1)
    assert_same(model, [[5, 9, 3], [8]], tokens=16)
    change(model)
    assert_same(model, [[5, 9, 3], [8]], tokens=16, seed=1)


def test_a_decoder_is_kept_while_the_batch_fits_and_the_model_lives():
    model = make_model(vocab_size=20)

    def decoder_for(model, prompts):
        sample(model, prompts, True, tokens=1)  # it comes from the prompt: nothing is compiled
        return DECODERS[model]

    first = decoder_for(model, [[5], [6, 7]])
    assert decoder_for(model, [[5] * 128, [6]]) is first
    longer = decoder_for(model, [[5] * 129, [6]])
    assert longer is not first
    assert decoder_for(model, [[5], [6]]) is longer
    assert decoder_for(model, [[5], [6], [7]]) is not longer
    assert len(DECODERS) == 1
    del model, first, longer
    gc.collect()
    assert len(DECODERS) == 0


@pytest.mark.gpu
def test_on_a_gpu_cuda_graphs_write_the_same(monkeypatch):
    from torch._dynamo.utils import counters

    monkeypatch.setattr(cuda_graph, "SHORTEST", 16)
    model = make_model(vocab_size=40, initializer_range=0.1).cuda()
    prompts = [[5, 9, 3], [8], [7, 7, 1, 3]]
    counters.clear()
    for seed in range(3):
        assert_same(model, prompts, seed=seed, tokens=40)
        change(model)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 3 and counters["inductor"]["cudagraph_skips"] == 0
    with torch.autocast("cuda", torch.bfloat16):
        rollouts = sample(model, prompts, True, tokens=40)
        for question in range(3):
            ids = rollouts.completion_ids[question]
            scored = group_logprobs(model, rollouts.prompt_ids[question], ids, 1.0)
            gap = (scored - rollouts.logprobs[question])[rollouts.completion_mask[question]]
            assert gap.abs().max() < 0.05
