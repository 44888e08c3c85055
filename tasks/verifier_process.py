"""Other people's verifiers, each in a process of its own.

A library that reads what a model wrote may hang in C code, take all memory, set signals or carry
text out as code. `Judge("tasks.math")` answers with that module's `judge(*request)`, called in
another process whose time and memory the kernel limits. The run itself is out of its reach.
"""

import ast
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

SECONDS = 2.0  # of processor time for one verdict
BYTES = 4 * 2**30  # of address space


class Judge:
    """Calls `judge(*request)` of a module that also has an EXAMPLE, a request to warm up with.

    Requests and verdicts are JSON. The process starts at the first request and ends with this one.
    """

    def __init__(self, module, seconds=SECONDS):
        self.module, self.seconds, self.process = module, seconds, None

    def __call__(self, *request):
        """The verdict; None where judging raises an error or goes beyond `seconds` or BYTES."""
        try:
            if self.process is None:
                self._start()
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        except BaseException:  # a time limit, a signal: the verdict must not answer what is next
            self.stop()
            raise
        if not line:
            self.stop()
            return None
        return json.loads(line)

    def _start(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tasks.verifier_process", self.module, str(self.seconds)],
            cwd=Path(__file__).parent.parent, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the run
        )  # fmt: skip
        if not self.process.stdout.readline():
            raise RuntimeError(f"the judge of {self.module} does not start")

    def stop(self):
        """End the process, if there is one; the next request starts another."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


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
