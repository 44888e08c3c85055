"""The decoder for GPUs: a token is one CUDA graph instead of some thousand kernels that the host
would have to launch one by one, which takes it several times as long as the GPU needs for them.

A graph does again what was recorded: the same kernels, on the same addresses, with whatever numbers
the host had then. So all steps have the same shapes. What differs from decoder.py: rows that have
finished stay until they are half of all; the completions' cache is read in lengths that double,
with a mask; and how much is written stands where a graph can read it. A new shape is a new graph,
which takes about as long to record as two steps without one.

Letters as in decoder.py.
"""

import torch

from sampling.decoder import Decoder

SHORTEST = 128  # tokens of the cache that the first steps read


class CudaGraph:
    """What a function does on the GPU, to be done again by `replay`.

    The function is called twice: once so that libraries make themselves ready, which they cannot
    while it is recorded, and once for that. What it returns is written over by every replay.
    """

    def __init__(self, function):
        function()
        self.graph = torch.cuda.CUDAGraph()
        # What other threads do meanwhile, such as NCCL's watchdog, does not concern it.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.result = function()

    def replay(self):
        self.graph.replay()
        return self.result


RECORDERS = {"cuda": CudaGraph}  # by device type; elsewhere the host is quick enough


def recorder_for(model, device_type):
    """How to record this model's steps there; None where the host takes them one by one, as it has
    to for rotary embeddings whose frequencies depend on how far a text has come."""
    if model.config.get_text_config().rope_parameters["rope_type"] == "dynamic":
        return None
    return RECORDERS.get(device_type)


class GraphDecoder(Decoder):
    """Decoder, used in the same way."""

    def __init__(self, model, group_size, max_new_tokens, recorder):
        super().__init__(model, group_size, max_new_tokens, shares=False)
        self.recorder = recorder

    @torch.inference_mode()
    def step(self, tokens):
        self.tokens.copy_(tokens)
        if self.length != self.length_to_read():
            self.graph = None  # frees its memory before the next takes its own
            self.length = self.length_to_read()
            self.graph = self.recorder(self._one_token)
        logits = self.graph.replay()
        self._advance()
        return logits

    def length_to_read(self):
        """The least power of two that `written` and the token at hand fit in."""
        return min(max(SHORTEST, 1 << self.written.bit_length()), self.max_new_tokens)

    def branch(self, parents):
        """Drop rows once half of them have finished."""
        if 2 * len(parents) > len(self.position):
            return parents
        rows = super().branch(parents)
        self.tokens = torch.zeros_like(self.position)
        self.length = self.graph = None
        return rows

    def _make_room(self):
        super()._make_room()
        for cache in (*self.keys, *self.values):
            cache.zero_()  # what is masked must still be finite
        self.tokens = torch.zeros_like(self.position)  # (R,), read by the next step
        self.now = torch.zeros(1, dtype=torch.long, device=self.device)  # `written`, for a graph
        self.length = self.graph = None  # how much of the cache is read, and the step that does

    def _advance(self):
        self.position += 1
        self.now += 1
        self.written += 1

    def _one_token(self):
        return self._layers(self.tokens[:, None], self.position[:, None], self._attend_group)

    def _remember(self, layer, k, v):
        """As Decoder's, and what of it to leave out: (R, K, C, S) twice, and (1, 1, 1, C)."""
        cached = []
        for cache, new in ((self.keys[layer], k), (self.values[layer], v)):
            cache = cache[: len(new)]
            cache.index_copy_(2, self.now, new.transpose(1, 2))
            cached.append(cache[:, :, : self.length])
        ahead = torch.arange(self.length, device=self.device) > self.now  # (C,)
        bias = torch.zeros_like(ahead, dtype=k.dtype).masked_fill(ahead, -torch.inf)
        return *cached, bias[None, None, None]
