"""What every module may need: errors, model names, seeds, files, limits, memory."""

import ctypes
import difflib
import functools
import json
import math
import os
import platform
import random
import signal
import sys
import threading
from contextlib import contextmanager
from numbers import Real
from pathlib import Path

EMBEDDED_MODEL = "smollm2-135m"
EMBEDDED_SIGHTED = f"{EMBEDDED_MODEL}+vision"
ADAPTER_CONFIG = "adapter_config.json"  # peft's, in a directory with an adapter
# For glibc from 2.35 on, see keep_freed_memory. It reads past the first colon.
TUNABLES = ":glibc.malloc.tcache_count=0"
STARTED_AGAIN = "GRPO_STARTED_AGAIN"  # a variable, set from a process to itself
SIGNALS = (signal.SIGINT, signal.SIGTERM)  # what ends a run that saves itself first


class UserError(Exception):
    """A mistake the user can mend: shown as one line, exit status 2, no traceback."""


class Stopped(BaseException):
    """SIGINT or SIGTERM, whose `number` it has. Not an Exception, so that nothing that handles
    errors, in a reward function say, takes it for one."""

    def __init__(self, number):
        super().__init__(signal.Signals(number).name)
        self.number = number


def printable(text, kept=""):
    """`text` with all that a terminal would obey, but for the characters in `kept`, written out."""
    return "".join(c if c.isprintable() or c in kept else ascii(c)[1:-1] for c in text)


def one_line(text, limit=200):
    """`text` as one printable line; of a longer one than `limit` characters the middle goes.

    A mistake is named at the start of its message and mended at the end.
    """
    line = printable(text)
    tail = limit // 2 - 5
    return line if len(line) <= limit else f"{line[: limit // 2]} ... {line[-tail:]}"


def hint(word, words):
    """What to say of a word that is none of these: the closest one, or all of them."""
    close = difflib.get_close_matches(word, words, n=1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(words)}"


def named(args, flag):
    """A flag and its value, as a message names it: of one that nobody typed, it says that it is the
    preset's."""
    text = f"--{flag} {getattr(args, flag)}"
    given = flag in getattr(args, "typed", vars(args))
    return text if given else f"{text} (of --preset {args.preset})"


@functools.cache
def keep_freed_memory():
    """Have the C allocator reuse large blocks. Call it before all else: where the C library is
    glibc, Python starts again with the same arguments, for half of this can only be said to a
    process that starts. That half is left out in a notebook, under a debugger or profiler, and once
    torch is in; all of it where the C library has no mallopt.

    glibc hands every large tensor back to the kernel when it is freed, and on a CPU the page faults
    of the next one cost as much as the arithmetic: a GRPO update of SmolLM2-135M takes half the
    time with this. And glibc sets small freed blocks aside, some 450 of them, which keep the
    gigabyte that a pass leaves free from being one piece again, so that the next finds no room in
    it: a step takes 0.2 to 0.3 GiB less without. Pages stay small: for huge ones the kernel moved
    others about first, which cost more than they gave.
    """
    given = os.environ.get("GLIBC_TUNABLES", "")
    if os.environ.pop(STARTED_AGAIN, None):  # what this one starts, starts as it would have
        os.environ["GLIBC_TUNABLES"] = given.removesuffix(TUNABLES)
    elif _can_start_again():
        os.environ |= {STARTED_AGAIN: "1", "GLIBC_TUNABLES": given + TUNABLES}
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:
        m_trim_threshold, m_mmap_max = -1, -4  # from malloc.h
        mallopt(m_mmap_max, 0)  # no separate mapping for large blocks ...
        mallopt(m_trim_threshold, -1)  # ... and never shrink the heap


def _can_start_again():
    """Whether this is a plain Python process with nothing in it yet, on a glibc with TUNABLES."""
    if sys.gettrace() or sys.getprofile() or not sys.executable:
        return False
    if sys.modules.keys() & {"torch", "IPython", "pydevd", "memray"}:
        return False
    return knows_tunables(*platform.libc_ver())


def knows_tunables(library, version):
    """Whether a C library of this name and version has all that TUNABLES set."""
    return library == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 35)


def release_freed_memory(device):
    """Hand what keep_freed_memory keeps back to the kernel, where tensors are on the CPU and the C
    library is glibc.

    For the border between sampling and training: they need blocks of such different sizes that the
    one could hardly use what the other freed, and a process would hold both. Not between passes,
    those of the reference included: what they free is nearly what the next one needs, and every
    page that was handed back costs time to get again.
    """
    if device.type != "cpu":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim:
        trim(0)


def to_device(tensor, device):
    """The host's tensor there; where that is a GPU, the host does not wait for the copy."""
    if str(device).startswith("cuda"):
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def hub_token():
    """The user's Hugging Face token, if any; it is passed on to the hub and written nowhere."""
    token = (os.environ.get("HF_TOKEN") or os.environ.get("HUGGINGFACE_TOKEN") or "").strip()
    if not token.isascii() or not token.isprintable():  # what refuses it would show it
        raise UserError("HF_TOKEN: no token looks like that; unset it, or copy it again")
    return token or None


def base_and_adapters(name):
    """(the model that `name` stands for, directories of adapters to fold into it, one by one).

    A directory with an adapter says which model it is for, and that may be another such directory.
    Raises UserError where it does not.
    """
    adapters = []
    while os.path.isfile(file := os.path.join(name, ADAPTER_CONFIG)):
        try:
            if name in adapters:
                raise ValueError
            base = json.loads(Path(file).read_text(encoding="utf-8"))["base_model_name_or_path"]
            adapters, name = [name, *adapters], os.fspath(base)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"--model_name {name}: its {ADAPTER_CONFIG} is damaged or names no "
                            "base model; fetch it again") from None  # fmt: skip
    return name, adapters


def mixed_seed(*parts):
    """One 63-bit seed from several numbers or words, e.g. (seed, step): equal input, equal seed.

    A run's randomness is a function of its seed and the step alone, so that going on at step N
    needs no saved generator state.
    """
    return random.Random(repr(parts)).getrandbits(63)


def parameters_of(optimizer):
    """What an optimizer changes, group by group, as a list."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def read_jsonl(path, torn_end=False, as_written=()):
    """The objects in a file of one JSON object per line, as (line number, object).

    With `torn_end`, a last line that its writer did not finish is left out. Finite numbers in the
    fields `as_written` are the text that stands in the file: 1.10, 2e-06, twenty digits. Raises
    UserError `file:line: reason` for a line that is not a JSON object or gives a key twice, and for
    a file that cannot be read.
    """
    rows = []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    text = line.decode("utf-8-sig")  # Windows likes to start with a mark
                    row = json.loads(text, object_pairs_hook=without_repeats)
                    numbers = [name for name in as_written if is_number(row, name)]
                    if numbers:
                        written = json.loads(text, parse_float=str, parse_int=str)
                        row |= {name: written[name] for name in numbers}
                except RepeatedKey as error:
                    raise UserError(f"{path}:{number}: `{error}` is given twice; leave one of them "
                                    "out") from None  # fmt: skip
                except (ValueError, RecursionError) as error:
                    if torn_end and not line.endswith(b"\n"):
                        break
                    if isinstance(error, UnicodeDecodeError):
                        raise UserError(f"{path}:{number}: not UTF-8; save it as that") from None
                    reason = str(error).partition(": line")[0]  # of this line it is always 1
                    raise UserError(f"{path}:{number}: not JSON: {reason}; expected an object like "
                                    "{...} per line") from None  # fmt: skip
                if not isinstance(row, dict):
                    kind = "array" if isinstance(row, list) else type(row).__name__
                    raise UserError(f"{path}:{number}: expected an object like {{...}} per line, "
                                    f"not one {kind}")  # fmt: skip
                rows.append((number, row))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    return rows


class RepeatedKey(ValueError):
    pass


def without_repeats(pairs):
    """The dict of a JSON object's pairs. Of a key given twice json would silently keep the last."""
    row = {}
    for key, value in pairs:
        if key in row:
            raise RepeatedKey(key[:40])
        row[key] = value
    return row


def is_number(row, name):
    """Whether a row's field is a finite number (true is none)."""
    value = row.get(name) if isinstance(row, dict) else None
    return type(value) is int or (type(value) is float and math.isfinite(value))


def write_jsonl(path, rows, mode="w"):
    """Write one JSON object per line. A NaN becomes null, so that every line is standard JSON."""
    with open(path, mode, encoding="utf-8") as file:
        file.write(jsonl(rows))


def jsonl(rows):
    return "".join(json.dumps(finite(row), ensure_ascii=False) + "\n" for row in rows)


def replace_text(path, text):
    """Write a text file of which a reader, or a run that dies, leaves the old or the new whole."""
    partial = f"{path}.partial"
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def finite(value):
    """The same nested value with None for every float that is NaN or infinite."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value


def as_number(value):
    """The finite float that a reward or a verdict is; None for whatever is none.

    A bool is a number, and so are the scalars of numpy and torch (of shape ()). An int that no
    float holds, 10**400, is none.
    """
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    try:
        number = float(value) if isinstance(value, Real) else math.nan
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def table(rows):
    """Rows of strings as lines of aligned columns, with a rule under the first row."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows]
    return [lines[0].rstrip(), "-" * len(lines[0]), *(line.rstrip() for line in lines[1:])]


# --- limits ------------------------------------------------------------------------------------


class Beside(threading.Thread):
    """A function that runs beside what comes next. Nobody waits for it but `result`, which raises
    what it raised; at the program's end it is left behind."""

    def __init__(self, function, *args):
        super().__init__(daemon=True)
        self.call, self.value, self.error = (function, args), None, None
        self.start()

    def run(self):
        function, args = self.call
        try:
            self.value = function(*args)
        except BaseException as error:
            self.error = error

    def result(self):
        self.join()
        if self.error is not None:
            raise self.error
        return self.value


class TimedOut(BaseException):
    """Raised by `time_limit`. Not an Exception, which the code inside may well handle."""


@contextmanager
def time_limit(seconds):
    """Raise TimedOut where what is inside takes more than so many seconds; None is no limit.

    It is raised inside, again every second where it is swallowed, and at the end. In the main
    thread only, where signals are handled.
    """
    expired = False

    def expire(number, frame):
        nonlocal expired
        expired = True
        raise TimedOut

    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    if expired:
        raise TimedOut


@contextmanager
def not_counted():
    """Inside, the clock of the `time_limit` around it stands still: for a wait that is not the work
    of what is limited, such as for another process to start."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    left, again = signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left, again)


def context_of(config):
    """How many tokens a model reads at once, of its config.json as a dict.

    Rotary embeddings of type longrope have other frequencies once the longest text of a batch is
    longer than what the model was first trained on, so that from there a row depends on others.
    Raises KeyError, TypeError or AttributeError where the file is damaged.
    """
    config = {**config, **(config.get("text_config") or {})}  # of a model that sees, its text part
    context = config.get("n_positions") or config["max_position_embeddings"]
    ropes = [config.get(name) or {} for name in ("rope_parameters", "rope_scaling")]
    for rope in ropes:
        if "longrope" in (rope.get("rope_type"), rope.get("type")):
            first = config.get("original_max_position_embeddings")
            context = min(context, rope.get("original_max_position_embeddings") or first)
    return context
