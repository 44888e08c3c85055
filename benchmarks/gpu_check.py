"""What a machine with a GPU can tell: the tests marked gpu, then the benchmarks, as one table.

    make gpu-check ARGS="--dataset_path DIR_WITH_GSM8K"

Flags go to all benchmarks and win over those in here. The table is for docs/log.md.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

from common import ROOT, table

MODEL = ["--model_name", "Qwen/Qwen2.5-1.5B-Instruct"]
# Where two processes take turns, both models, gradients and moments have to fit.
SMALL_MODEL = ["--model_name", "Qwen/Qwen2.5-0.5B-Instruct"]
STEP = ["--group_size", "16", "--max_completion_length", "786"]  # as the preset h100
BENCHMARKS = {
    "decode_step": [],  # needs no hub
    "sampling_vs_generate": [*MODEL, "--questions", "4", *STEP],
    "vs_trl": [*SMALL_MODEL, "--questions", "4", "--trl_batch_size", "8", *STEP],
    "lora_vs_full": [*SMALL_MODEL, "--questions", "4", *STEP],
    "limit": [*MODEL, "--rows", "64", "128", *STEP],
}


def main():
    import torch

    if not torch.cuda.is_available():
        print("gpu_check.py: no CUDA device here", file=sys.stderr)
        sys.exit(2)
    started = time.strftime("%Y-%m-%d %H:%M")
    rows = [("what", torch.cuda.get_device_name())]
    rows.append(("tests marked gpu", last_line(["-m", "pytest", "-q", "-m", "gpu"])))
    for name, flags in BENCHMARKS.items():
        script = str(Path(__file__).with_name(f"{name}.py"))
        line = last_line([script, *flags, *sys.argv[1:]])
        rows += figures(name, line)
    print(
        f"\n{started}, torch {torch.__version__}: make gpu-check ARGS={' '.join(sys.argv[1:])!r}\n"
    )
    print(table(rows))
    sys.exit(any("failed" in str(value) for _, value in rows))


def last_line(command):
    """Run Python with these arguments, show what it prints, and return its last line."""
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    line = ""
    for line in process.stdout:
        print(line, end="", flush=True)
    return line.strip() if process.wait() == 0 else f"failed with status {process.returncode}"


def figures(name, line):
    """The rows of one benchmark's last line."""
    try:
        result = json.loads(line)
    except ValueError:
        return [(name, line)]
    rows = []
    for stage in result.pop("stages", []):
        label = f"{name}: {stage['stage']} of {stage['rows']} rows"
        rows.append((f"{label}, GFLOP/s", stage["gflops_per_second"]))
        rows.append((f"{label}, share of the limit", f"{stage['share_of_limit']:.1%}"))
    return [*((f"{name}: {key.replace('_', ' ')}", value) for key, value in result.items()), *rows]


if __name__ == "__main__":
    main()
