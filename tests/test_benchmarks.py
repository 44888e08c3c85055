"""The benchmarks run; what they measure is in LOG.md."""

import json
import subprocess
import sys

from conftest import ROOT


def test_the_sampling_benchmark_compares_both_and_ends_in_json(saved_models):
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "sampling_vs_generate.py", "--model_name",
         saved_models["qwen2"], "--questions", "2", "--group_size", "2", "--max_new_tokens", "5",
         "--rounds", "2"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["rows"] == 4
    assert result["ratio_min"] <= result["ratio"] <= result["ratio_max"]
