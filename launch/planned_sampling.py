"""What a step of a plan samples, on fake tensors (see planned_step.py).

Q questions per step, G completions per question, R = Q·G of both, V vocabulary.
"""

from functools import partial
from weakref import WeakMethod

import torch

from sampling.cuda_graph import GraphDecoder, recorder_for
from sampling.decoder import Decoder
from sampling.drawing import sample_tokens
from sampling.fallback import OwnLayers, falls_back
from sampling.groups import filters_of


def worst_prompts(questions, args):
    """Q prompts of the greatest length, as lists of ids, that have but their first tokens in common
    (a chat template begins all prompts alike). No two are equal, or they would be read as one."""
    rest = [0] * max(0, args.max_prompt_length - 3)
    prompts = ([0, question % 64, question // 64, *rest] for question in range(questions))
    return [prompt[: args.max_prompt_length] for prompt in prompts]


@torch.no_grad()
def sample(policy, questions, group_size, temperature, args, tracker, on_gpu):
    """What sample_rollouts does, its loop cut short to two tokens: the last, for memory,
    and one half-way. Their work gives that of a token on average, which goes by how much of the
    cache is read. Returns work and tokens of all; to record CUDA graphs is left out of both."""
    rows, length = questions * group_size, args.max_completion_length
    before = tracker.work
    with tracker.part("sampling copy"):
        if falls_back(policy):
            decoder = OwnLayers(policy, group_size, length, shares=False)
        elif on_gpu and recorder_for(policy, "cuda"):
            decoder = GraphDecoder(policy, group_size, length, partial(PlannedGraph, tracker))
        else:
            decoder = Decoder(policy, group_size, length, shares=False)
    if not falls_back(policy):
        make_room = WeakMethod(decoder._make_room)
        decoder._make_room = lambda: (tracker.begin(), make_room()())  # caches of all layers come
    uniforms = torch.zeros((length, rows), dtype=torch.float64)
    logits, row = decoder.prefill(worst_prompts(questions, args))  # (R, V), (R,)
    if not falls_back(policy):
        caches = (decoder.prompt_keys, decoder.prompt_values, decoder.keys, decoder.values)
        tracker.label([tensor for part in caches for tensor in part], "KV cache")
    prompts = tracker.work - before
    of_a_token = {}  # by how much of the cache is read
    for place in (length - 1, length // 2):
        before = tracker.work
        decoder.written = place
        if falls_back(policy):
            tracker.label(filled(decoder, args.max_prompt_length + place), "KV cache")
        read = decoder.length_to_read()
        tokens, _ = sample_tokens(logits, uniforms[place], temperature, filters_of(args), row)
        logits = decoder.step(tokens)
        of_a_token[read] = tracker.work - before
    return (
        prompts + at_length(of_a_token, average_read(decoder, length)) * length,
        questions * args.max_prompt_length + rows * length,
    )


def filled(decoder, length):
    """The cache of OwnLayers, filled up to `length` tokens per row, or as many as layers keep."""
    decoder.mask = decoder.mask.new_ones((len(decoder.mask), length))
    tensors = []
    for layer in decoder.cache.layers:
        kept = length
        if layer.is_sliding:
            layer.cumulative_length, kept = length, min(length, layer.sliding_window - 1)
        for name in ("keys", "values"):
            rows, heads, _, size = getattr(layer, name).shape
            tensors.append(getattr(layer, name).new_zeros((rows, heads, kept, size)))
            setattr(layer, name, tensors[-1])
    return tensors


def average_read(decoder, length):
    """Tokens of the completions' cache that a step reads."""
    total = 0
    for decoder.written in range(length):
        total += decoder.length_to_read()
    return total / length


def at_length(works, length):
    """Work there, on the line through those of {length: work}, one or two."""
    (low, less), (high, more) = min(works.items()), max(works.items())
    return less + (more - less) * ((length - low) / max(high - low, 1))


class PlannedGraph:
    """In place of a CUDA graph, what it would do."""

    def __init__(self, tracker, function):
        self.tracker = tracker
        self.function = WeakMethod(function)  # of the decoder, which refers to this

    def replay(self):
        with self.tracker.graph():
            return self.function()()
