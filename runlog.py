"""A run's directory: its configuration, metrics, completions and models, and its summary."""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

from alarms import new_alarms
from budget import budget_lines, sampled_counts
from grpo import has_signal
from runfiles import read_rows
from utils import finite, write_jsonl

PACKAGES = ("torch", "transformers", "datasets", "accelerate", "numpy")


class Run:
    """A run's directory, and the only writer of what is in it.

    config.json        the command, every flag, versions, device, commit
    metrics.jsonl      one line per training step
    eval.jsonl         one line per evaluation
    completions/       step_00012.jsonl: every rollout; eval_00020.jsonl: every held-out answer;
                       tokens_00012.jsonl: one group, token by token
    checkpoints/       step_00100/: the model in Hugging Face format
    model/             the final model in Hugging Face format
    plots/             PNGs, drawn from the files above alone
    report.html        the same as one page
    """

    def __init__(self, path):
        self.path = Path(path)
        self.completions = self.path / "completions"
        self.completions.mkdir(parents=True, exist_ok=True)

    def save_config(self, args, device, **facts):
        config = {
            "command": shlex.join(["python", *sys.argv]),
            "flags": vars(args),
            **facts,
            "device": device,
            "python": platform.python_version(),
            "packages": {name: metadata.version(name) for name in PACKAGES},
            "commit": _commit(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        text = json.dumps(finite(config), indent=2, ensure_ascii=False)
        (self.path / "config.json").write_text(text + "\n", encoding="utf-8")

    def log_step(self, metrics):
        """Write a step's metrics; `alarms` is added to them, a list of lines, mostly empty."""
        history = [*read_rows(self.path / "metrics.jsonl"), finite(metrics)]
        metrics["alarms"] = new_alarms(history, read_rows(self.path / "eval.jsonl"))
        write_jsonl(self.path / "metrics.jsonl", [metrics], mode="a")

    def log_evaluation(self, step, summary, records):
        write_jsonl(self.completions / f"eval_{step:05d}.jsonl", records)
        write_jsonl(self.path / "eval.jsonl", [{"step": step, **summary}], mode="a")

    def save_step(self, step, problems, rollouts, rewards=None, advantages=None):
        """Write a step's completions, with rewards and advantages (Q, G) once there are any.

        Returns the file.
        """
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
        if rewards is not None:
            scores = rewards.per_function.flatten(0, 1).tolist()  # (B, F)
            totals, flat = rewards.total.flatten().tolist(), advantages.flatten().tolist()
            for row, score, total, advantage in zip(rows, scores, totals, flat):
                row.update(rewards=dict(zip(rewards.names, score)), reward=total)
                row["advantage"] = advantage
        path = self.completions / f"step_{step:05d}.jsonl"
        write_jsonl(path, rows)
        return path

    def save_tokens(self, step, records):
        write_jsonl(self.completions / f"tokens_{step:05d}.jsonl", records)

    def save_model(self, model, tokenizer, name):
        """Save model and tokenizer as Hugging Face files under `name`, never half written."""
        target, partial = self.path / name, self.path / (name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        os.replace(partial, target)  # a run writes no name twice


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


def step_metrics(step, rollouts, rewards, update, seconds):
    """One line of metrics.jsonl: what was sampled, what it earned, what the update did, how long.

    `update` is what update_policy returned, `seconds` a dict of stages. Means are over the step's
    completions; `entropy` is the mean of -logprob over sampled tokens, an unbiased estimate of the
    policy's entropy at the sampling temperature where no filter (top_k, top_p, min_p) is on.
    """
    tokens = int(rollouts.completion_mask.sum())
    total = rewards.total
    per_function = rewards.per_function.mean((0, 1)).tolist()
    return {
        "step": step,
        "reward": total.mean().item(),
        "reward_std": total.std(-1).mean().item(),
        **{f"rewards/{name}": value for name, value in zip(rewards.names, per_function)},
        **update,
        "entropy": -rollouts.logprobs.sum().item() / tokens,
        "completion_length": tokens / total.numel(),
        "truncated": (~rollouts.finished).float().mean().item(),
        "flat_groups": 1 - has_signal(total).float().mean().item(),
        "tokens_per_second": tokens / seconds["sampling"],
        **sampled_counts(rollouts, total),
        **{f"seconds/{stage}": spent for stage, spent in seconds.items()},
    }


def show_progress(bar, metrics, evaluation, completion):
    """Advance the bar by one step; print a completion where one is given, and any alarm."""
    step = metrics["step"]
    if completion is not None:
        bar.write(f"--- step {step}, reward {metrics['reward']:.2f}\n{completion}")
    for alarm in metrics["alarms"]:
        bar.write(f"step {step}: alarm: {alarm}")
    shown = {"reward": f"{metrics['reward']:.2f}", "accuracy": f"{evaluation['accuracy']:.1%}"}
    if "kl" in metrics:
        shown["kl"] = f"{metrics['kl']:.4f}"
    shown["length"] = f"{metrics['completion_length']:.0f}"
    shown["tok/s"] = f"{metrics['tokens_per_second']:.0f}"
    bar.set_postfix(shown, refresh=False)
    bar.update()


def summary_table(path, before, after):
    """What a run ends with: the held-out figures before and after, its budget, where to look."""
    keys = [key for key in before if key not in ("problems", "accuracy_low", "accuracy_high")]
    rows = [("held-out, greedy", "before GRPO", "after")]
    for key in keys:
        rows.append((key, *(_cell(key, evaluation) for evaluation in (before, after))))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows]
    rule = "-" * len(lines[0])
    return "\n".join([
        "", lines[0], rule, *(line.rstrip() for line in lines[1:]), rule,
        f"{before['problems']} problems; in brackets the 95 % interval.",
        *budget_lines(read_rows(path / "metrics.jsonl")),
        f"Everything is in {path}; {path}/plots/overview.png shows it at a glance.",
        f"The model loads with AutoModelForCausalLM.from_pretrained({str(path / 'model')!r}).",
        f"The report, to open in a browser: {path}/report.html",
    ])  # fmt: skip


def _cell(key, evaluation):
    if key == "accuracy":
        low, high = evaluation["accuracy_low"], evaluation["accuracy_high"]
        return f"{evaluation[key]:.1%} [{low:.1%}, {high:.1%}]"
    if key in ("format_rate", "truncated"):
        return f"{evaluation[key]:.1%}"
    return f"{evaluation[key]:.3g}"
