"""Python starts again, once, for what the C library can only be told before a process starts."""

import json
import os
import platform
import subprocess
import sys

import pytest
from conftest import ROOT

from utils import TUNABLES, knows_tunables

GLIBC = knows_tunables(*platform.libc_ver())
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


@pytest.mark.skipif(not GLIBC, reason="not glibc, or of before 2.35")
def test_it_starts_again_once_as_it_was_started(tmp_path):
    said, starts = started(tmp_path)
    assert starts == ["None", TUNABLES]
    # What it starts itself does not have them.
    assert said == [["--a flag", "1"], 1, "", "said"]


@pytest.mark.skipif(not GLIBC, reason="not glibc, or of before 2.35")
def test_settings_of_the_users_own_stay(tmp_path):
    given = "glibc.malloc.arena_max=2"
    said, starts = started(tmp_path, given)
    assert starts == [given, given + TUNABLES]
    assert said[2] == given


@pytest.mark.parametrize("before", [
    "sys.settrace(lambda *_: None)", "sys.setprofile(lambda *_: None)", "sys.modules['torch'] = 1",
    "sys.modules['pydevd'] = 1", "sys.modules['IPython'] = 1", "sys.modules['memray'] = 1",
])  # fmt: skip
def test_under_a_debugger_in_a_notebook_or_late_it_does_not(tmp_path, before):
    said, starts = started(tmp_path, before=before)
    assert starts == ["None"]
    assert said == [["--a flag", "1"], 1, None, "said"]


@pytest.mark.skipif(not GLIBC, reason="not glibc, or of before 2.35")
def test_main_starts_again_before_all_else(tmp_path):
    """Whatever it is asked for; mallopt is told as well, then, and no variable is left."""
    (tmp_path / "sitecustomize.py").write_text(
        "import ctypes, os, sys\n"
        "if 'main.py' in str(sys.orig_argv):\n"
        "    with open(os.environ['LOG'], 'a') as file:\n"
        "        print('start', os.getpid(), file=file)\n"
        "    own = ctypes.CDLL\n"
        "    class Watched(own):\n"
        "        def __getattr__(self, name):\n"
        "            if name == 'mallopt':\n"
        "                left = [n for n in os.environ if 'STARTED_AGAIN' in n]\n"
        "                with open(os.environ['LOG'], 'a') as file:\n"
        "                    print('mallopt', 'utils' in sys.modules, left, file=file)\n"
        "            return super().__getattr__(name)\n"
        "    ctypes.CDLL = Watched\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "LOG": str(tmp_path / "log")}
    environment.pop("GLIBC_TUNABLES", None)
    subprocess.run(
        [sys.executable, ROOT / "main.py", "--help"], env=environment, check=True,
        capture_output=True, timeout=60,
    )  # fmt: skip
    first, second, *told = (tmp_path / "log").read_text().splitlines()
    assert first == second and first.startswith("start")
    assert told == ["mallopt True []"]


@pytest.mark.parametrize("executable", ["None", "''"])
def test_where_python_does_not_know_itself_it_goes_on(tmp_path, executable):
    said, starts = started(tmp_path, before=f"sys.executable = {executable}")
    assert starts == ["None"]
    assert said == [["--a flag", "1"], 1, None, "said"]


def test_older_and_other_c_libraries_do_not_know_the_settings():
    known = {("glibc", "2.35"), ("glibc", "2.39.1"), ("glibc", "3.0")}
    unknown = {("glibc", "2.34"), ("glibc", "2.4"), ("musl", "1.2.5"), ("", "")}
    assert {each for each in known | unknown if knows_tunables(*each)} == known
