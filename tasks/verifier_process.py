"""Other people's verifiers, each in a process of its own.

A library that reads what a model wrote may hang in C code, take all memory, set signals or carry
text out as code. `Judge("tasks.math")` answers with that module's `judge(*request)`, called in
another process whose time and, on Linux, memory the kernel limits. The run itself is out of its
reach.
"""

import ast
import importlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from select import select

from utils import not_counted

SECONDS = 2.0  # of processor time for one verdict
BYTES = 4 * 2**30  # of address space
START = 120.0  # seconds that a process may take to start
REMEMBERED = 2**14  # verdicts: more than a step or an evaluation asks for


class Judge:
    """Calls `judge(*request)` of a module that also has an EXAMPLE, a request to warm up with.

    Requests and verdicts are JSON, and remembered: rewards and accuracy ask the same. Processes
    start at the first request, or before it by `start`, and end with this one. Their start is no
    part of the time limit of whoever asks.
    """

    def __init__(self, module, seconds=SECONDS):
        self.module, self.seconds = module, seconds
        self.processes = []  # ready, and asked nothing
        self.verdicts = {}  # by request, as a line

    def __call__(self, *request):
        """The verdict; None where judging raises an error or goes beyond `seconds` or BYTES."""
        line = json.dumps(request)
        if line not in self.verdicts:
            with not_counted():
                self.start()
            process = self.processes[0]
            try:
                self._ask(process, line)
                self._read(process, line)
            except BaseException:  # a signal, say: the verdict must not answer what is next
                self._end(process)
                raise
        return self.verdicts[line]

    def ahead(self, requests, workers, timeout=None):
        """Have up to `workers` processes judge these side by side, for whoever asks later on.

        A request that takes more than `timeout` seconds is left unjudged.
        """
        waiting = [json.dumps(request) for request in requests]
        waiting = [line for line in dict.fromkeys(waiting) if line not in self.verdicts]
        asked = {}  # {process: (its request, until when)}
        try:
            while waiting or asked:
                if waiting:
                    self.start(min(workers, len(waiting) + len(asked)))
                for process in self.processes[:workers]:
                    if waiting and process not in asked:
                        asked[process] = waiting[0], time.monotonic() + (timeout or math.inf)
                        self._ask(process, waiting.pop(0))
                until = min(until for _, until in asked.values())
                wait = None if until == math.inf else max(0, until - time.monotonic())
                answered = select([process.stdout for process in asked], [], [], wait)[0]
                for process, (line, until) in [*asked.items()]:
                    if process.stdout in answered:
                        self._read(process, line)
                    elif time.monotonic() < until:
                        continue
                    else:
                        self._end(process)
                    del asked[process]
        except BaseException:
            for process in asked:
                self._end(process)
            raise

    def start(self, workers=1):
        """Have at least so many processes ready. Raises RuntimeError where one does not start."""
        new = [self._started() for _ in range(workers - len(self.processes))]
        self.processes += new
        try:
            for process in new:
                if not (select([process.stdout], [], [], START)[0] and process.stdout.readline()):
                    raise RuntimeError(f"the judge of {self.module} does not start")
        except BaseException:
            for process in new:
                self._end(process)
            raise

    def stop(self):
        """End the processes; the next request starts another."""
        for process in [*self.processes]:
            self._end(process)

    def _started(self):
        return subprocess.Popen(
            [sys.executable, "-m", "tasks.verifier_process", self.module, str(self.seconds)],
            cwd=Path(__file__).parent.parent, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the run
        )  # fmt: skip

    def _ask(self, process, line):
        with suppress(BrokenPipeError):  # it has ended, which _read finds out
            process.stdin.write(line + "\n")
            process.stdin.flush()

    def _read(self, process, line):
        """Remember the verdict on a request; None of a process that has ended over it."""
        answer = process.stdout.readline()
        if not answer:
            self._end(process)
        self.verdicts[line] = json.loads(answer) if answer else None
        if len(self.verdicts) > REMEMBERED:
            del self.verdicts[next(iter(self.verdicts))]

    def _end(self, process):
        process.kill()
        process.communicate()
        self.processes.remove(process)


@contextmanager
def without_eval(package, read=ast.literal_eval):
    """Inside, `eval` is `read` in the modules of a package: a literal, where nothing else is said.

    Text that is not what `read` expects raises an error there and is never carried out.
    """
    modules = [module for name, module in sys.modules.items() if name.startswith(f"{package}.")]
    for module in modules:
        module.eval = read
    try:
        yield
    finally:
        for module in modules:
            del module.eval


def serve(name, seconds):
    """The other process: a request a line on standard input, its verdict on standard output."""
    channel, sys.stdout = sys.stdout, sys.stderr
    with suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    module = importlib.import_module(name)
    module.judge(*module.EXAMPLE)
    print("ready", file=channel, flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # the kernel ends the process
        try:
            verdict = module.judge(*json.loads(line))
        except Exception:
            verdict = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(verdict), file=channel, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], float(sys.argv[2]))
