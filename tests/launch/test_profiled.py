"""main.py under a profiler, whose own file is the program that Python runs."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_main_is_the_same_under_a_profiler(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "cProfile", "-o", "profile", ROOT / "main.py", "plot"],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    line = "main.py plot: error: name at least one run, e.g. runs/demo (see --help)"
    assert done.stderr.splitlines() == [line]
