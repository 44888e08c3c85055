"""The decoder for torch.compile, which makes fewer and larger kernels of a step.

Since compiling takes minutes, what is compiled has to serve all batches of a run. What differs from
cuda_graph.py: rows that have finished go on until all have, and whatever a step reads or writes
lies where it lay in the last batch, since a graph remembers addresses. The price is memory: a copy
of the weights and the caches of a whole batch stay allocated during training.

Letters as in decoder.py.
"""

from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F

from sampling.cuda_graph import GraphDecoder
from training.lora import whole_weight
from utils import UserError

COMPILER = {"cuda": {"mode": "reduce-overhead"}}  # arguments of torch.compile, by device type
LENGTHS = 16  # how many lengths of the cache, each a graph of its own, may be compiled
ROOM = 128  # the room for prompts is a multiple of this

# For every model the decoder last made. It lives as long as the model, which it must not refer to.
DECODERS = WeakKeyDictionary()


def static_decoder(model, prompts, group_size, max_new_tokens):
    """The model's static decoder, with the weights as they are now.

    Only a batch of another shape, or with a longer prompt than there was room for, makes a new one
    and compiles again.
    """
    longest = max(len(prompt) for prompt in prompts)
    room = -(-longest // ROOM) * ROOM
    shape = (len(prompts), group_size, max_new_tokens, torch.is_autocast_enabled(model.device.type))
    decoder = DECODERS.get(model)
    if decoder is None or decoder.shape != shape or decoder.room < room:
        decoder = DECODERS[model] = None  # frees the memory before the next one takes its own
        decoder = DECODERS[model] = StaticDecoder(model, shape, room)
    decoder.copy_weights()
    return decoder


def static(tensor):
    """A copy of the tensor that stays where it is, for CUDA graphs to read it there."""
    with torch.inference_mode(False):
        tensor = tensor.clone()
    torch._dynamo.mark_static_address(tensor)
    return tensor


class StaticLinear:
    """What decoder.joined does, with weights that are renewed in place."""

    def __init__(self, linears, dtype):
        self.linears = linears
        self.weight = static(torch.cat([whole_weight(linear, dtype) for linear in linears]))
        self.bias = None
        if linears[0].bias is not None:
            self.bias = static(torch.cat([linear.bias.to(dtype) for linear in linears]))

    def copy_weights(self):
        sizes = [linear.out_features for linear in self.linears]
        for part, linear in zip(self.weight.split(sizes), self.linears):
            part.copy_(whole_weight(linear, part.dtype))
        if self.bias is not None:
            for part, linear in zip(self.bias.split(sizes), self.linears):
                part.copy_(linear.bias)

    def __call__(self, x, plus=None):
        y = F.linear(x, self.weight, self.bias)
        return y if plus is None else plus + y


class StaticDecoder(GraphDecoder):
    """GraphDecoder, used in the same way, for any number of batches of one shape."""

    joined = StaticLinear

    def __init__(self, model, shape, room):
        _, group_size, max_new_tokens, _ = shape
        super().__init__(model, group_size, max_new_tokens, recorder=None)
        for parameter in self.decoder.parameters():  # norms and embedding, read where they are
            torch._dynamo.mark_static_address(parameter)
        self.shape, self.room = shape, room
        self.buffers = None
        self.compiled = torch.compile(  # not of `self._one_token`, a cycle that would hold memory
            StaticDecoder._one_token,
            fullgraph=True,
            dynamic=False,
            recompile_limit=LENGTHS,
            isolate_recompiles=True,
            **COMPILER.get(self.device.type, {}),
        )

    @torch.no_grad()
    def copy_weights(self):
        for block in self.blocks:
            for linear in (block.query_key_value, block.output, block.gate_up, block.down):
                linear.copy_weights()
        self.head.copy_weights()

    def step(self, tokens):
        self.length = self.length_to_read()
        torch.compiler.cudagraph_mark_step_begin()  # the last step's logits have been used
        try:
            logits = self.compiled(self, tokens)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = " ".join(str(error).split())[:100]
            raise UserError(f"--compile_sampler: torch.compile failed: {reason}") from error
        self._advance()
        return logits

    def branch(self, parents):
        """All rows stay: every number of rows would have to be compiled."""
        return parents

    def _one_token(self, tokens):
        return self._layers(tokens[:, None], self.position[:, None], self._attend_group)

    def _make_room(self):
        """Lay what prefill has read where the graphs look for it."""
        missing = self.room - self.prompt_bias.shape[-1]
        fresh = {
            "position": [self.position],
            "prompt_bias": [F.pad(self.prompt_bias, (0, missing), value=-torch.inf)],
            "prompt_keys": [F.pad(keys, (0, 0, 0, missing)) for keys in self.prompt_keys],
            "prompt_values": [F.pad(values, (0, 0, 0, missing)) for values in self.prompt_values],
        }
        if self.buffers is None:
            self.buffers = {name: [static(x) for x in tensors] for name, tensors in fresh.items()}
            super()._make_room()
            self.place, self.now = static(self.place), static(self.now)
            self.keys = [static(keys) for keys in self.keys]
            self.values = [static(values) for values in self.values]
        for name, tensors in fresh.items():
            for buffer, tensor in zip(self.buffers[name], tensors):
                buffer.copy_(tensor)
        [self.position], [self.prompt_bias] = self.buffers["position"], self.buffers["prompt_bias"]
        self.prompt_keys = self.buffers["prompt_keys"]
        self.prompt_values = self.buffers["prompt_values"]
        self.now.zero_()
