"""What every module may need: user errors, seeds, and the record that a run leaves on disk."""

import ctypes
import json
import os
import platform
import random
import shutil
import subprocess
import time
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "transformers", "datasets", "accelerate", "numpy")


class UserError(Exception):
    """A mistake the user can mend: shown as one line, exit status 2, no traceback."""


def keep_freed_memory():
    """Have the C allocator reuse large blocks, in huge pages. Call it before torch is imported.

    glibc hands every large tensor back to the kernel when it is freed, and on a CPU the page faults
    of the next one cost as much as the arithmetic: a GRPO update of SmolLM2-135M takes half the
    time with this. Does nothing where the C library has no mallopt.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch: transparent huge pages
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:
        m_trim_threshold, m_mmap_max = -1, -4  # from malloc.h
        mallopt(m_mmap_max, 0)  # no separate mapping for large blocks ...
        mallopt(m_trim_threshold, -1)  # ... and never shrink the heap


def hub_token():
    """The user's Hugging Face token, if any; it is passed on to the hub and written nowhere."""
    return os.environ.get("HF_TOKEN") or os.environ.get("HUGGINGFACE_TOKEN") or None


def mixed_seed(*numbers):
    """One 63-bit seed from several integers, e.g. (seed, step): equal input, equal seed.

    A run's randomness is a function of its seed and the step alone, so that going on at step N
    needs no saved generator state.
    """
    return random.Random(repr(numbers)).getrandbits(63)


def read_jsonl(path):
    """The objects in a file of one JSON object per line, as (line number, object).

    Raises UserError `file:line: reason` for a line that is not a JSON object, and for a file that
    cannot be read.
    """
    rows = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{path}:{number}: not JSON: {error}") from None
                if not isinstance(row, dict):
                    raise UserError(f"{path}:{number}: expected an object like {{...}}")
                rows.append((number, row))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{path}: {reason}") from None
    return rows


def write_jsonl(path, rows, mode="w"):
    """Write one JSON object per line. A NaN becomes null, so that every line is standard JSON."""
    with open(path, mode, encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(_finite(row), ensure_ascii=False) + "\n")


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value


class Stopwatch:
    """Seconds per stage: `with stopwatch("sampling"): ...`, then `stopwatch.seconds`.

    `synchronize` (on CUDA: torch.cuda.synchronize) makes a stage pay for the work that it queued.
    """

    def __init__(self, synchronize=None):
        self.synchronize = synchronize or (lambda: None)
        self.seconds = {}

    @contextmanager
    def __call__(self, stage):
        started = time.perf_counter()
        try:
            yield
            self.synchronize()
        finally:
            spent = time.perf_counter() - started
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent


class Run:
    """A run's directory, and the only writer of what is in it.

    config.json        every flag, versions, device, commit
    metrics.jsonl      one line per training step
    eval.jsonl         one line per evaluation
    completions/       step_00012.jsonl: every rollout; eval_00020.jsonl: every held-out answer
    checkpoints/       step_00100/: the model in Hugging Face format
    model/             the final model in Hugging Face format
    plots/             PNGs, drawn from the files above alone
    """

    def __init__(self, path):
        self.path = Path(path)
        self.completions = self.path / "completions"
        self.completions.mkdir(parents=True, exist_ok=True)

    def save_config(self, args, device, **facts):
        config = {
            "flags": vars(args),
            **facts,
            "device": device,
            "python": platform.python_version(),
            "packages": {name: metadata.version(name) for name in PACKAGES},
            "commit": _commit(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        text = json.dumps(_finite(config), indent=2, ensure_ascii=False)
        (self.path / "config.json").write_text(text + "\n", encoding="utf-8")

    def log_step(self, metrics):
        write_jsonl(self.path / "metrics.jsonl", [metrics], mode="a")

    def log_evaluation(self, step, summary, records):
        write_jsonl(self.completions / f"eval_{step:05d}.jsonl", records)
        write_jsonl(self.path / "eval.jsonl", [{"step": step, **summary}], mode="a")

    def save_rollouts(self, step, problems, rollouts):
        """Write a step's completions before they are scored; returns the file's path.

        `save_rewards` adds the scores to the same lines.
        """
        path = self.completions / f"step_{step:05d}.jsonl"
        rows = [
            {
                "question": problem.question,
                "answer": problem.answer,
                "completion": text,
                "finished": finished,
            }
            for problem, texts, ended in zip(problems, rollouts.texts, rollouts.finished.tolist())
            for text, finished in zip(texts, ended)
        ]
        write_jsonl(path, rows)
        return path

    def save_rewards(self, path, rewards, advantages):
        """Add each completion's rewards and advantage to the file `save_rollouts` wrote."""
        rows = [row for _, row in read_jsonl(path)]
        scores = rewards.per_function.flatten(0, 1).tolist()  # (B, F)
        totals, flat = rewards.total.flatten().tolist(), advantages.flatten().tolist()
        for row, score, total, advantage in zip(rows, scores, totals, flat):
            row.update(rewards=dict(zip(rewards.names, score)), reward=total, advantage=advantage)
        write_jsonl(path, rows)

    def save_model(self, model, tokenizer, name):
        """Save model and tokenizer as Hugging Face files under `name`, whole or not at all."""
        target, partial = self.path / name, self.path / (name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
        return target


def _commit():
    """The checkout's commit, with `+changes` where files differ from it; None outside git."""
    here = Path(__file__).parent
    git = ["git", "-C", str(here)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10
        )
        changes = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def print_summary(path, before, after):
    print(before); print(after); print(path)
