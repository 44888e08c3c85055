"""What reaches a run from outside: signals, another process in its directory, its launcher.

Nothing heavy is imported here: a signal may come before torch is loaded.
"""

import fcntl
import os
import signal
import sys
import traceback
from contextlib import contextmanager, suppress
from pathlib import Path

from records.resuming import checkpoints_in
from utils import SIGNALS, UserError

LOCK = ".lock"


def exit_now(number, frame=None):
    """A signal handler that ends the process at once, with status 130 or 143."""
    if is_main():
        name = signal.Signals(number).name
        os.write(2, f"\nmain.py: interrupted by {name}; nothing was done yet that could be "
                    "saved\n".encode())  # fmt: skip
    os._exit(128 + number)


def exit_on_signals():
    """Until there is something to save, a signal simply ends the process."""
    for number in SIGNALS:
        signal.signal(number, exit_now)


def stopped_line(stop, output_dir):
    """What a run says last that a signal ended: which step is saved, where, and how to go on."""
    line = f"main.py: interrupted by {stop}; "
    for step, path in checkpoints_in(Path(output_dir) / "checkpoints")[:1]:
        return f"{line}step {step} is saved in {path}; to go on: --resume --output_dir {output_dir}"
    return f"{line}nothing was done yet that could be saved"


@contextmanager
def only_process_in(path):
    """Lock a run's directory. Raises UserError where another process has it.

    A directory that nothing else was written to is gone afterwards. Of a run of several processes,
    the main one locks it.
    """
    if not is_main():
        yield
        return
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    taken = UserError(f"--output_dir {path}: another process is running in it")
    lock = path / LOCK
    with open(lock, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.path.samestat(os.fstat(file.fileno()), os.stat(lock))
        except (BlockingIOError, FileNotFoundError):
            raise taken from None
        if not ours:  # its owner has removed it meanwhile
            raise taken
        try:
            yield
        finally:
            if os.listdir(path) == [LOCK]:
                with suppress(OSError):
                    lock.unlink()
                    path.rmdir()


def is_main():
    """Whether this is a run's main process, or its only one: torchrun and accelerate say which."""
    return os.environ.get("RANK", "0") == "0"


def silence_all_but_main():
    """Of a run's processes the main one alone prints, the others nothing but errors."""
    if not is_main():
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        sys.excepthook = lambda *error: traceback.print_exception(*error, file=sys.__stderr__)


def print_error(line):
    """An error's one line, from whichever process."""
    if is_main():
        print(line, file=sys.stderr)
    else:
        print(f"{line} (process {os.environ['RANK']})", file=sys.__stderr__)
