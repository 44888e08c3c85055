"""A frozen model that is read once a step: meanwhile its weights lie in a file, not in memory.

On a CPU, where memory is what a process has resident. The file is mapped: weights are read from it,
or from what the kernel keeps of it, as soon as a pass touches them, and the kernel may drop them
whenever memory runs short (from a disk; in a tmpfs they stay, and nothing is gained or lost).
"""

import mmap
import shutil
import tempfile
from pathlib import Path
from weakref import WeakKeyDictionary

import torch

ALIGNMENT = 64  # bytes, what torch's kernels like
LEAST = 2**20  # bytes, below which a model just stays
TO_SPARE = 10  # times its size, so that checkpoints find room beside it
MAPPED = WeakKeyDictionary()  # each model's mapping; None: it stays in memory


def rest(model, folder, shared=()):
    """Let go of the memory of a model that nothing writes to, until it is read again.

    folder: where its file is, which has no name and ends with the process. Parameters of another
    model that are `shared` with it stay where they are. Does nothing on other devices, for less
    than LEAST, and where the system maps no files or the folder has no room to spare.
    """
    if model.device.type != "cpu" or not hasattr(mmap, "MADV_DONTNEED"):
        return
    if model not in MAPPED:
        elsewhere = {id(parameter) for parameter in shared}
        own = [p for p in model.parameters() if id(p) not in elsewhere]
        MAPPED[model] = mapped(own, folder if Path(folder).is_dir() else tempfile.gettempdir())
    if MAPPED[model] is not None:
        MAPPED[model].madvise(mmap.MADV_DONTNEED)


def mapped(parameters, folder):
    """Move these parameters into a file. Returns its mapping, which they now stand in, or None
    where they stay."""
    starts, size = [], sum(parameter.nbytes for parameter in parameters)
    try:
        if not LEAST < size <= shutil.disk_usage(folder).free / TO_SPARE:
            return None
        with tempfile.TemporaryFile(dir=folder) as file:
            for parameter in parameters:
                starts.append(file.tell())
                file.write(parameter.detach().contiguous().flatten().view(torch.uint8).numpy())
                file.write(bytes(-file.tell() % ALIGNMENT))
            file.flush()
            # A copy of one's own where it is written to, which nobody does: torch asks for it.
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError:
        return None
    for parameter, start in zip(parameters, starts):
        count, dtype = parameter.numel(), parameter.dtype
        stored = torch.frombuffer(mapping, dtype=dtype, count=count, offset=start)
        parameter.data = stored.view(parameter.shape)
    return mapping
