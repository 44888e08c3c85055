"""What tensors hold and what operations cost, as they happen, on real and on fake tensors alike.

Fake tensors (torch's FakeTensorMode) have shapes, dtypes and lifetimes but no memory: whatever runs
on them shows how much it would take. Seen are the results of operations, not what a kernel takes
for itself meanwhile.
"""

import weakref
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten

# Operations that read only as much of their inputs as they write.
LOOK_UPS = (aten.embedding, aten.index_select, aten.gather, aten.index)


@dataclass(frozen=True)
class Machine:
    """What a prediction of time assumes: rates that are reached, not those of a data sheet."""

    name: str
    flops: dict  # dtype: floating-point operations per second in matrix products
    bandwidth: float  # bytes per second
    least_seconds: float  # of the device, for however small an operation
    host_seconds: float  # what the host needs to start one operation
    overlaps: bool  # whether it starts operations while others run


@dataclass(frozen=True)
class Work:
    """Floating-point operations, seconds of the device, and operations that the host starts."""

    flops: float = 0.0
    seconds: float = 0.0
    operations: float = 0.0

    def __add__(self, other):
        return Work(
            self.flops + other.flops,
            self.seconds + other.seconds,
            self.operations + other.operations,
        )

    def __mul__(self, times):
        return Work(self.flops * times, self.seconds * times, self.operations * times)

    def __sub__(self, other):
        return self + other * -1

    def predicted_seconds(self, machine):
        host = self.operations * machine.host_seconds
        return max(self.seconds, host) if machine.overlaps else self.seconds + host


class Tracker(TorchDispatchMode):
    """Bytes alive, by part, the most there were in a phase, and work; inside `with tracker:`.

    A phase is told stretch by stretch as well: embedding, layers, head, and so on. One begins where
    an operation reads a layer's weight after one outside of the layers, or the other way round, and
    where `begin` says so. See planned_step.extended.
    """

    def __init__(self, machine=None, vocab_size=None):
        super().__init__()
        self.machine, self.vocab_size = machine, vocab_size
        self.live = Counter()  # part: bytes
        self.peaks = [Counter()]  # of each stretch, what `live` was when its sum was highest
        self.work = Work()
        self.stretches = {}  # name: `peaks` of that phase
        self._held = {}  # storage: [bytes, part, is a layer's weight; None: no weight]
        self._part = self._in_layers = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # asked of fake tensors, more often than all else
            return args[0].fake_device
        if is_composite(func):  # inference mode leaves these whole
            with self:
                return func.decompose(*args, **kwargs)
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        self._follow(func, read)
        out = func(*args, **kwargs)
        results = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        new = [self._see(tensor) for tensor in results]
        if self.machine and (any(new) or func._schema.is_mutable):  # else it is a view, no work
            self.work += self._work_of(func, args, kwargs, out, read, results)
        return out

    @property
    def phases(self):
        """{name: what was alive, by part, when that phase held most}."""
        return {name: max(peaks, key=Counter.total) for name, peaks in self.stretches.items()}

    @contextmanager
    def part(self, name):
        """What is made inside belongs to the part `name`, and is a weight if it is made of one."""
        before, self._part = self._part, name
        try:
            yield
        finally:
            self._part = before

    @contextmanager
    def phase(self, name):
        """`stretches[name]` become the peaks inside, `phases[name]` the highest."""
        self.peaks, self._in_layers = [self.live.copy()], None
        yield
        self.stretches[name] = self.peaks

    @contextmanager
    def graph(self):
        """What is done inside, the host starts as one operation."""
        before = self.work.operations
        yield
        self.work = replace(self.work, operations=before + 1)

    def label(self, tensors, part, of_layers=None):
        """These tensors belong to the part `part`, from now on. of_layers: of weights, whether they
        are the layers'."""
        for tensor in tensors:
            self._see(tensor)
            held = self._held[_storage(tensor)[1]]
            self.live[held[1]] -= held[0]
            self.live[part] += held[0]
            held[1:] = part, of_layers

    def begin(self):
        """Begin a stretch."""
        self.peaks.append(self.live.copy())

    def _follow(self, func, read):
        """Begin a stretch where the first weight among what is read is in the layers and the last
        one read was not, or the other way round."""
        kinds = (self._held.get(_storage(tensor)[1], [None])[-1] for tensor in read)
        of_layers = next((kind for kind in kinds if kind is not None), self._in_layers)
        if func.overloadpacket is aten.embedding_dense_backward:  # which does not read the weight
            of_layers = False
        if of_layers != self._in_layers:
            self._in_layers = of_layers
            self.begin()

    def _see(self, tensor):
        """Count a tensor's storage until it is freed. Returns whether it had not been counted."""
        holder, key, size = _storage(tensor)
        if key in self._held:
            return False
        part = self._part or ("logits" if self._are_logits(tensor) else "activations")
        self._held[key] = [size, part, self._in_layers if self._part else None]
        self.live[part] += size
        weakref.finalize(holder, self._free, key).atexit = False
        if self.live.total() > self.peaks[-1].total():
            self.peaks[-1] = self.live.copy()
        return True

    def _are_logits(self, tensor):
        return tensor.ndim > 0 and tensor.shape[-1] == self.vocab_size

    def _free(self, key):
        size, part, _ = self._held.pop(key)
        self.live[part] -= size

    def _work_of(self, func, args, kwargs, out, read, results):
        """An operation takes as long as its arithmetic or its bytes do, whichever is longer, and as
        long as the device needs for anything."""
        if func.overloadpacket is aten.index_copy_:
            read = results = read[-1:]
        elif func.overloadpacket in LOOK_UPS:
            read = results
        moved = sum(x.numel() * x.element_size() for x in (*read, *results))
        flops = flops_of(func, args, kwargs, out)
        seconds = moved / self.machine.bandwidth
        if flops:
            seconds = max(seconds, flops / self.machine.flops[read[0].dtype])
        return Work(flops, max(seconds, self.machine.least_seconds), 1)


def _storage(tensor):
    """(what is freed with a tensor's memory, a key for it, bytes)."""
    if tensor.layout is torch.strided:
        storage = tensor.untyped_storage()
        return storage, storage._cdata, storage.nbytes()
    # Weights that oneDNN has laid out show no storage.
    return tensor, id(tensor), tensor.numel() * tensor.element_size()


@cache
def is_composite(func):
    """Whether an operation is made of others."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return func.namespace != "prim" and torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), key
    )


def flops_of(func, args, kwargs, out):
    """Floating-point operations of matrix products and attention; the rest is none to speak of."""
    packet = func.overloadpacket
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        return sdpa_flop_count(*(x.shape for x in args[:3]))
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return sdpa_backward_flop_count(*(x.shape for x in args[:4]))
    if packet in flop_registry:
        return flop_registry[packet](*args, **kwargs, out_val=out)
    return 0
