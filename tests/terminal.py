"""A command in a pseudo-terminal, and what its screen shows when: `python tests/terminal.py`.

Run as a script it trains the embedded model for two steps with 16 held-out problems, and says how
long the screen stood still at most, and where the seconds went.
"""

import fcntl
import os
import pty
import re
import select
import shutil
import signal
import struct
import sys
import tempfile
import termios
import time
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The cursor's movements and colours, and what a terminal does not show.
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def recorded(argv, seconds=600, columns=120, typed=()):
    """Run a command in a terminal of its own, where each of `typed` is typed when it asks for it by
    "> ". Returns (status, [(seconds since its start, what was written)]).
    """
    started, keys = time.monotonic(), iter(typed)
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
        fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack("4H", 40, columns, 0, 0))
        os.execvp(argv[0], argv)
    writes, shown, key = [], b"", b""
    while time.monotonic() - started < seconds:
        if not select.select([terminal], [], [], 0.2)[0]:
            silent = time.monotonic() - writes[-1][0] - started if writes else 0
            if typed and ((silent > 3 and shown == b"> ") or (silent > 20 and key == b"\x03")):
                os.write(terminal, key)  # it came while the other side was not ready for it
                writes.append((time.monotonic() - started, ""))
            continue
        try:
            data = os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        writes.append((time.monotonic() - started, data.decode(errors="replace")))
        shown = (shown + data)[-2:]  # what is written at once may be read in parts
        if typed and shown == b"> ":
            key = next(keys).encode()
            os.write(terminal, key)
    else:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(terminal)
    writes.append((time.monotonic() - started, ""))
    return os.waitstatus_to_exitcode(status), writes


def changes(writes):
    """[(seconds, the line at the bottom)] for every write that changed what is on the screen: what
    the last line shows, or a line above it."""
    line, found = "", [(0.0, "")]
    for when, text in writes:
        before = line
        parts = re.split(r"([\r\n])", CONTROL.sub("", text))
        for part in parts:
            line = "" if part in "\r\n" else line + part
        if "\n" in text or line.strip() != before.strip():
            found.append((when, line.strip()))
    return [*found, (writes[-1][0], line.strip())]


def longest_gap(writes):
    """(seconds, what stood on the screen) of the longest time without a change."""
    seen = changes(writes)
    gaps = [(after - before, line) for (before, line), (after, _) in pairwise(seen)]
    return max(gaps)


def main():
    folder = Path(tempfile.mkdtemp())
    argv = [sys.executable, str(ROOT / "main.py"), *"--preset cpu --num_train_iters 2".split(),
            "--eval_problems", "16", "--output_dir", str(folder / "run")]  # fmt: skip
    status, writes = recorded(argv)
    print(CONTROL.sub("", "".join(text for _, text in writes)).replace("\r", "\n"))
    stages = {}
    seen = changes(writes)
    for (before, line), (after, _) in pairwise(seen):
        stage = re.match(r"[a-z ]*", line)[0].strip() or "other"
        stages[stage] = stages.get(stage, 0) + after - before
    for stage, spent in sorted(stages.items(), key=lambda pair: -pair[1]):
        print(f"{spent:6.1f} s  {stage}")
    gap, line = longest_gap(writes)
    print(f"status {status}, {writes[-1][0]:.1f} s; the longest time without a change: {gap:.1f} s "
          f"at {line[:60]!r}")  # fmt: skip
    shutil.rmtree(folder)
    return status or int(gap > 5)


if __name__ == "__main__":
    sys.exit(main())
