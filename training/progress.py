"""What a run is at, how far and for how long: its stages, their seconds, the line on the screen."""

import re
import threading
import time
from contextlib import contextmanager

from tqdm import tqdm

from utils import UserError

# Which flags to lower where a phase of the run does not fit in memory.
LOWER = {
    "cold start": "--micro_batch_tokens",
    "sampling": "--sampling_batch_size, --questions_per_step or --max_completion_length",
    "playing": "--sampling_batch_size or --questions_per_step",
    "referee": "--micro_batch_tokens",
    "rewards": "--micro_batch_tokens where a referee judges",
    "reference": "--micro_batch_tokens",
    "policy": "--micro_batch_tokens",
    "evaluation": "--eval_batch_size",
    "short evaluation": "--eval_batch_size",
    "answering": "--max_completion_length or --group_size",
}


@contextmanager
def phase(name):
    """A phase of the run. Where memory runs out in it, the UserError names it and what to lower."""
    try:
        with progress.shown(name):
            yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        text = str(error)
        full = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        if not (full or re.search("allocate memory|not enough memory|ALLOC_FAILED", text)):
            raise
        lower = f"lower {LOWER[name]}, or " if name in LOWER else ""
        raise UserError(f"out of memory ({name}): {lower}see --plan") from error


class Progress:
    """The line at the bottom of a terminal: what runs, how far it is, how many seconds.

    `shown` says what runs, `tick` how far it is, and a thread writes it anew every second, so that
    nothing is silent. Where standard error is no terminal nothing is drawn. What is printed
    meanwhile goes through tqdm.write.
    """

    def __init__(self):
        self.bar, self.thread = None, None  # nothing is drawn before `open`
        self.stages = []  # [name, when it began, {unit: [done, of]}], those inside others last
        self.began = time.monotonic()
        self.past = {}  # {name: (seconds, {unit: done})}, of each stage's last time

    def __enter__(self):
        if self.bar is None:
            self.open(bar_format="{desc}", leave=False)
        return self

    def __exit__(self, *_):
        self.close()

    def open(self, **how):
        """A new line, as tqdm draws it. Returns the bar."""
        self.close()
        self.bar = tqdm(**how, dynamic_ncols=True, disable=None)
        if not (self.bar.disable or self.thread):
            self.thread = threading.Thread(target=self._keep_drawing, daemon=True)
            self.thread.start()
        self.draw()
        return self.bar

    def close(self):
        bar, self.bar = self.bar, None
        if bar is not None:
            bar.close()

    def _keep_drawing(self):
        while True:
            time.sleep(1)
            self.draw()

    def draw(self):
        bar = self.bar
        if bar is not None and not bar.disable:
            bar.set_description_str(self.text() + (": " if bar.total else ""))

    def text(self):
        """What runs, in words, e.g. "evaluation, 128 of 512 problems, 12 s"."""
        if not self.stages:
            return "" if self.past else f"starting, {time.monotonic() - self.began:.0f} s"
        name, began, counts = self.stages[-1]
        done = [f"{n:,} {f'of {of:,} ' if of else ''}{unit}" for unit, (n, of) in counts.items()]
        return ", ".join([name, *done, f"{time.monotonic() - began:.0f} s"])

    def tick(self, more, unit, of=None):
        """So many more of these are done, `of` all that there are to do, where that is known."""
        if self.stages:
            counts = self.stages[-1][2]
            counts[unit] = [counts.get(unit, [0])[0] + more, of]

    @contextmanager
    def shown(self, name):
        """What is inside is what runs."""
        stage = [name, time.monotonic(), {}]
        self.stages.append(stage)
        self.draw()
        try:
            yield
        finally:
            self.stages.pop()
            counts = {unit: done for unit, (done, _) in stage[2].items()}
            self.past[name] = time.monotonic() - stage[1], counts
            self.draw()


progress = Progress()  # of this process


class Stopwatch:
    """Seconds per stage: `with stopwatch("sampling"): ...`, then `stopwatch.lap()`.

    `synchronize` (on CUDA: torch.cuda.synchronize) makes a stage pay for the work that it queued.
    """

    def __init__(self, synchronize=None):
        self.synchronize = synchronize or (lambda: None)
        self.seconds = {}

    def lap(self):
        """The seconds since the last call, by stage."""
        seconds, self.seconds = self.seconds, {}
        return seconds

    @contextmanager
    def __call__(self, stage):
        started = time.perf_counter()
        try:
            with phase(stage):
                yield
                self.synchronize()
        finally:
            spent = time.perf_counter() - started
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent
