"""Decoding by CUDA graphs: a stand-in for them on the CPU, and the same on a GPU."""

import gc
import weakref
from typing import ClassVar

import pytest
import torch
from conftest import make_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toys import HostTensors, Waits, Words, group_logprobs, seeds

from sampling import cuda_graph
from sampling.groups import sample_rollouts

VARIANTS = [
    {"family": "qwen2"},
    {"family": "qwen3"},
    {"family": "llama", "attention_bias": True, "tie_word_embeddings": False},
]
PROMPTS = [[5, 9, 3], [8], [7, 7, 1, 3]]


class Graph(TorchDispatchMode):
    """Does what a CUDA graph does: `replay` repeats the operations that it recorded, on the same
    memory and with the same numbers of the host, whatever the function would do by then."""

    made: ClassVar = []

    def __init__(self, function):
        super().__init__()
        self.operations, self.replays = [], 0
        function()
        with self:
            self.result = function()
        self.result.fill_(torch.nan)  # a recording computes nothing
        self.made.append(self)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        self.replays += 1
        for func, args, kwargs, out in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        return self.result


@pytest.fixture
def graphs(monkeypatch):
    """Every graph that is recorded from now on."""
    monkeypatch.setattr(cuda_graph, "SHORTEST", 16)
    monkeypatch.setattr(Graph, "made", [])
    return Graph.made


def sample(model, prompts, recorders, tokens=40, seed=0, group_size=8, **more):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_graph, "RECORDERS", recorders)
        return sample_rollouts(
            model, Words(0), prompts, group_size, tokens, 1.0, seeds(seed), **more
        )


def assert_same(model, prompts, recorders, **settings):
    """Returns the completions' lengths."""
    eager = sample(model, prompts, {}, **settings)
    replayed = sample(model, prompts, recorders, **settings)
    assert torch.equal(eager.completion_ids, replayed.completion_ids)
    assert torch.equal(eager.completion_mask, replayed.completion_mask)
    assert torch.equal(eager.finished, replayed.finished)
    assert (eager.logprobs - replayed.logprobs).abs().max() < 1e-4
    return eager.completion_mask.sum(-1)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_what_graphs_write_is_what_the_eager_steps_write(variant, graphs):
    model = make_model(vocab_size=20, **variant)
    lengths = assert_same(model, PROMPTS, {"cpu": Graph})
    assert len(lengths.unique()) > 5  # rows finish at different times
    # Two lengths of the cache, 16 and 32 (of 40, none is left to read), and one or more graphs for
    # fewer rows: each serves many steps.
    assert len(graphs) < 8 and sum(graph.replays for graph in graphs) == lengths.max() - 1


def test_rows_are_dropped_when_half_of_them_have_finished(graphs, monkeypatch):
    model = make_model(vocab_size=20)
    rows = []
    monkeypatch.setattr(Graph, "replay", noting_rows(rows, Graph.replay))
    lengths = assert_same(model, PROMPTS, {"cpu": Graph}, tokens=80)
    assert rows[0] == 24 and rows[-1] <= 6 and rows == sorted(rows, reverse=True)
    alive = [int((lengths > n).sum()) for n in range(1, len(rows) + 1)]
    assert all(left <= row < max(2 * left, 2) for left, row in zip(alive, rows))


def noting_rows(rows, replay):
    def noted(graph):
        rows.append(len(graph.result))
        return replay(graph)

    return noted


@pytest.mark.parametrize("rope_type, recorded", [("linear", True), ("dynamic", False)])
def test_a_rotary_embedding_that_the_host_works_out_is_not_recorded(rope_type, recorded, graphs):
    """transformers reads the positions on the host for it, which a graph must not."""
    rope = {"rope_type": rope_type, "factor": 2.0, "rope_theta": 10_000.0}
    assert_same(make_model(vocab_size=20, rope_parameters=rope), PROMPTS, {"cpu": Graph})
    assert bool(graphs) == recorded


def test_under_autocast_graphs_have_its_precision(graphs):
    model = make_model(vocab_size=20, initializer_range=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        rollouts = sample(model, PROMPTS, {"cpu": Graph})
        assert scored_otherwise(model, rollouts) < 0.05
    assert {x.dtype for x in tree_leaves(graphs[0].operations) if isinstance(x, torch.Tensor)} >= {
        torch.bfloat16
    }


def scored_otherwise(model, rollouts):
    """The greatest difference of a token's log-prob when sampled and when scored."""
    gaps = []
    for question, prompt in enumerate(rollouts.prompt_ids):
        ids, mask = rollouts.completion_ids[question], rollouts.completion_mask[question]
        scored = group_logprobs(model, prompt, ids, 1.0)
        gaps.append((scored - rollouts.logprobs[question])[mask].abs().max())
    return max(gaps)


def test_replaying_a_step_makes_the_host_wait_for_nothing(graphs):
    model, events = make_model(vocab_size=20), []
    with HostTensors([]), Waits(events):
        sample(model, PROMPTS, {"cpu": Graph}, tokens=12)
    graph = graphs[0]
    del events[:]
    with torch.inference_mode(), HostTensors(events), Waits(events):
        graph.replay()
    assert len(graph.operations) > 50 and events == []


def test_a_decoder_and_its_graphs_are_gone_when_the_batch_is(graphs, monkeypatch):
    """Their memory is free when the update begins, without waiting for a garbage collector."""
    made: ClassVar = []

    class Noted(cuda_graph.GraphDecoder):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(weakref.ref(self))

    monkeypatch.setattr("sampling.groups.GraphDecoder", Noted)
    gc.disable()
    try:
        sample(make_model(vocab_size=20), PROMPTS, {"cpu": Graph}, tokens=3)
        assert [decoder() for decoder in made] == [None]
    finally:
        gc.enable()


@pytest.mark.gpu
def test_on_a_gpu_graphs_write_what_the_eager_steps_write(monkeypatch):
    monkeypatch.setattr(cuda_graph, "SHORTEST", 16)
    model = make_model(vocab_size=40, initializer_range=0.1).cuda()
    for seed in range(3):
        assert_same(model, PROMPTS, cuda_graph.RECORDERS, seed=seed, tokens=70)
    with torch.autocast("cuda", torch.bfloat16):
        rollouts = sample(model, PROMPTS, cuda_graph.RECORDERS, tokens=40)
        assert scored_otherwise(model, rollouts) < 0.05


@pytest.mark.gpu
def test_on_a_gpu_batch_after_batch_takes_no_more_memory():
    model = make_model(vocab_size=40, hidden_size=256, num_hidden_layers=4).cuda()
    held = []
    for seed in range(6):
        sample(model, PROMPTS, cuda_graph.RECORDERS, seed=seed, tokens=200)
        held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert held[-1][0] <= held[1][0] and held[-1][1] <= 1.5 * held[1][1]
