"""Python starts again, once, for what the C library can only be told before a process starts."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from utils import TUNABLES

GLIBC = "CS_GNU_LIBC_VERSION" in getattr(os, "confstr_names", ())
SHOW = """
import json, os, sys
{}
sys.path.insert(0, sys.argv[1])
from utils import keep_freed_memory
with open(sys.argv[2], "a") as file:
    print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), file=file)
keep_freed_memory()
keep_freed_memory()
print(json.dumps([sys.argv[3:], sys.flags.optimize, os.environ.get("GLIBC_TUNABLES"), input()]))
"""


def started(tmp_path, given=None, before=""):
    """What a script printed that starts again, and the (process, settings of malloc) of its starts.
    It has arguments of its own, some of Python's, and reads a line."""
    script, log = tmp_path / "a script.py", tmp_path / "log"
    script.write_text(SHOW.format(before))
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment |= {"GLIBC_TUNABLES": given} if given else {}
    result = subprocess.run(
        [sys.executable, "-O", script, ROOT, log, "--a flag", "1"], input="said\n",
        env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert not result.returncode, result.stderr
    starts = [line.split() for line in log.read_text().splitlines()]
    assert len({process for process, _ in starts}) == 1
    return json.loads(result.stdout), [settings for _, settings in starts]


@pytest.mark.skipif(not GLIBC, reason="the C library is not glibc")
def test_it_starts_again_once_as_it_was_started(tmp_path):
    said, starts = started(tmp_path)
    assert starts == ["None", TUNABLES]
    # What it starts itself does not have them.
    assert said == [["--a flag", "1"], 1, "", "said"]


@pytest.mark.skipif(not GLIBC, reason="the C library is not glibc")
def test_settings_of_the_users_own_stay(tmp_path):
    given = "glibc.malloc.arena_max=2"
    said, starts = started(tmp_path, given)
    assert starts == [given, given + TUNABLES]
    assert said[2] == given


@pytest.mark.parametrize("before", [
    "sys.settrace(lambda *_: None)", "sys.modules['pydevd'] = 1", "sys.modules['IPython'] = 1",
    "sys.modules['torch'] = 1",
])  # fmt: skip
def test_under_a_debugger_in_a_notebook_or_late_it_does_not(tmp_path, before):
    said, starts = started(tmp_path, before=before)
    assert starts == ["None"]
    assert said == [["--a flag", "1"], 1, None, "said"]
