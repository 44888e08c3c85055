"""A run's directory: its configuration, metrics, completions and models, and its summary."""

import json
import platform
import re
import shlex
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

import torch
from tqdm import tqdm

from evaluation.comparison import evaluation_table, gains, p_against
from evaluation.referees import referee_metrics
from evaluation.scoring import truncated_thinking
from grpo import has_signal
from records.alarms import new_alarms
from records.budget import budget_lines, in_words, sampled_counts
from records.files import read_rows
from records.plots import plot_run
from records.report import write_report
from records.resuming import REPORT
from records.rollout_file import save_rollouts
from records.thumbnails import save_thumbnails
from records.trackers import log_evaluation, log_plots, log_row
from rldatasets import completion_fields, shown_fields
from training.progress import progress
from utils import Beside, finite, jsonl, read_jsonl, replace_text, write_jsonl

REWARDS_CHANGED = "rewards: they are others from this step on (--allow_changed_rewards)"
PACKAGES = ("torch", "transformers", "datasets", "accelerate", "numpy", "peft", "reasoning-gym",
            "math-verify")  # fmt: skip


class Run:
    """A run's directory, and the only writer of what is in it. `trackers` get the figures as well.
    Of a run of several processes all have one, and that of the main process alone writes.

    config.json        the first command, every flag, versions, device, and every start of the run
    metrics.jsonl      one line per training step
    eval.jsonl         one line per evaluation
    short_eval.jsonl   the same of an eighth of the problems (--short_eval_iterations)
    referee.jsonl      what a referee has answered (--referee), each question once
    completions/       step_00012.jsonl: every rollout; eval_00020.jsonl: every held-out answer;
                       tokens_00012.jsonl: one group, token by token; games_00020.jsonl: of a
                       game, the policy's moves and some of its games
    rollouts/          step_00012.safetensors: the same rollouts, token by token (--save_rollouts)
    checkpoints/       step_00100/: what --resume goes on from, see checkpoints.py
    model/             the final model in Hugging Face format
    plots/             PNGs, drawn from the files above alone
    report.html        the same as one page
    grpo/, wandb/      what trackers keep on this disk (--track)
    """

    def __init__(self, path, trackers=(), writes=True):
        self.path, self.trackers, self.writes = Path(path), trackers, writes
        self.completions = self.path / "completions"
        if writes:
            self.completions.mkdir(parents=True, exist_ok=True)
        self.config = {}  # what config.json holds, see save_config
        self.evaluations = {}  # step: summary
        self.short_evaluations = set()  # steps
        self.rows = []  # the lines of metrics.jsonl, for the alarms

    def cut_back(self, done):
        """Forget whatever is later than `done` steps: a resumed run makes it again, once."""
        kept = {}
        if self.writes:
            (self.path / REPORT).unlink(missing_ok=True)  # so that one is that of the run's end
        names = {"metrics.jsonl": done - 1, "eval.jsonl": done, "short_eval.jsonl": done}
        for name, last in names.items():
            path = self.path / name
            kept[name] = [row for row in read_rows(path) if row["step"] <= last]
            if self.writes and path.exists():  # also where all it holds is a torn line
                replace_text(path, jsonl(kept[name]))
        for path in (*self.completions.glob("*_*.jsonl"), *self.path.glob("rollouts/step_*")):
            ours = re.fullmatch(r"(step|eval|games|tokens)_(\d{5,})", path.stem)
            last = done if ours and ours[1] in ("eval", "games") else done - 1
            if ours and self.writes and int(ours[2]) > last:
                path.unlink()
        self.rows, self.evaluations = kept["metrics.jsonl"], {}
        self.short_evaluations = {row["step"] for row in kept["short_eval.jsonl"]}
        for row in kept["eval.jsonl"]:
            if row["step"] == done:
                log_evaluation(self.trackers, row)
            row.pop("alarms", None)
            self.evaluations[row.pop("step")] = row

    @property
    def first_evaluation(self):
        return self.evaluations[min(self.evaluations)]

    @property
    def last_evaluation(self):
        return self.evaluations[max(self.evaluations)]

    def save_config(self, args, device, saved=None, step=0, **facts):
        """Write config.json. `saved` is what it held, where a run goes on at `step`: the first
        command and commit stay, and this start joins the others in `starts`."""
        now = {
            "command": shlex.join(["python", *sys.argv]),
            "commit": _commit(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        first = {name: saved[name] for name in now if name in saved} if saved else now
        starts = saved.get("starts", [{**first, "step": 0}]) if saved else []
        self.config = {
            **first,
            "flags": vars(args),
            **facts,
            "device": device,
            "python": platform.python_version(),
            "packages": _versions(),
            "starts": [*starts, {**now, "step": step}],
        }
        if self.writes:
            text = json.dumps(finite(self.config), indent=2, ensure_ascii=False)
            replace_text(self.path / "config.json", text + "\n")

    def log_step(self, metrics):
        """Write a step's metrics; `alarms` is added to them, a list of lines, mostly empty."""
        self.rows.append(finite(metrics))
        metrics["alarms"] = new_alarms(self.rows, self._evaluation_rows(), "step")
        if metrics["step"] in self.config.get("rewards_changed_at", ()):
            metrics["alarms"].append(REWARDS_CHANGED)
        self._write("metrics.jsonl", [metrics], mode="a")
        log_row(self.trackers, metrics)

    def _write(self, name, rows, mode="w"):
        if self.writes:
            write_jsonl(self.path / name, rows, mode=mode)

    def log_evaluation(self, step, summary, records, games=()):
        """Write an evaluation. Returns its summary, with McNemar's p-value against step 0."""
        if self.writes and step > 0 and (first := self.first_records()) is not None:
            summary = {**summary, "mcnemar_p": p_against(first, records)}
        self._write(f"completions/eval_{step:05d}.jsonl", records)
        if self.writes and step > 0 and games:
            summary = {**summary, **gains(self._records("games_00000.jsonl") or [], games)}
        if games:
            self._write(f"completions/games_{step:05d}.jsonl", games)
        self.evaluations[step] = summary
        alarms = new_alarms(self.rows, self._evaluation_rows(), "eval")
        row = {"step": step, **summary, "alarms": alarms}
        self._write("eval.jsonl", [row], mode="a")
        log_evaluation(self.trackers, row, records)
        for alarm in row["alarms"]:
            tqdm.write(f"step {step}: alarm: {alarm}")
        return summary

    def log_short_evaluation(self, step, summary):
        """Write a short evaluation, of which no answers are kept."""
        self.short_evaluations.add(step)
        self._write("short_eval.jsonl", [{"step": step, **summary}], mode="a")
        if "before_cold_start" not in summary:
            log_row(self.trackers, {"step": step, "short_accuracy": summary["accuracy"]})

    def first_records(self):
        """The records of the evaluation at step 0; None where there are none."""
        return self._records("eval_00000.jsonl")

    def _records(self, name):
        path = self.completions / name
        return [record for _, record in read_jsonl(path)] if path.exists() else None

    def _evaluation_rows(self):
        return [{"step": step, **summary} for step, summary in self.evaluations.items()]

    def save_step(self, step, problems, rollouts, rewards=None, advantages=None):
        """Write a step's completions, with rewards and advantages (Q, G) once there are any.

        Returns the file.
        """
        rows = [
            {
                "question": problem.question,
                "answer": problem.answer,
                **shown_fields(problem),
                **completion_fields(text),
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
        name = f"completions/step_{step:05d}.jsonl"
        self._write(name, rows)
        return self.path / name

    def save_rollouts(self, step, rollouts, rewards, advantages, chosen):
        """Write a step's rollouts, token by token. rewards: Rewards; the others are (Q, G)."""
        if self.writes:
            path = self.path / "rollouts" / f"step_{step:05d}.safetensors"
            save_rollouts(path, rollouts, rewards, advantages, chosen)

    @contextmanager
    def drawn_meanwhile(self, step, with_report=False):
        """Draw the plots anew, on another core, while what is inside is done: saving, which is as
        long. Then write the report, where the run is at its end: it says that all else is there.
        """
        if not self.writes:
            yield
            return
        drawn = Beside(lambda: log_plots(self.trackers, step, plot_run(self.path)))
        yield
        with progress.shown("drawing figures"):
            drawn.result()
            if with_report:
                write_report(self.path)

    def save_tokens(self, step, problems, records):
        """Write one group token by token, see token_log.py; nothing without records."""
        if records:
            self._write(f"completions/tokens_{step:05d}.jsonl", records)
            self.save_thumbnails([problems[records[0]["row"] // len(records)]])

    def save_thumbnails(self, problems):
        """Write what these problems show, small, for the report."""
        if self.writes:
            save_thumbnails(self.path, problems)


def _versions():
    """{package: version} of those installed; the last few are optional."""
    versions = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _commit():
    """The checkout's commit, with `+changes` where files differ from it; None outside git."""
    git = ["git", "-C", str(Path(__file__).parent)]
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


def step_metrics(step, rollouts, rewards, update, setup):
    """One line of metrics.jsonl: what was sampled, what it earned, what the update did, how long.

    `update` is what update_policy returned; the seconds are those of setup.stopwatch. Means are
    over the step's completions. The mean of -logprob over sampled tokens is an unbiased estimate of
    the policy's entropy at the sampling temperature; where a filter (top_k, top_p, min_p) chose
    them, it is their cross-entropy under the unfiltered policy, and called that.
    """
    tokens = int(rollouts.completion_mask.sum())
    total, on_gpu = rewards.total, torch.cuda.is_available()
    args, seconds = setup.args, setup.stopwatch.lap()
    filtered = args.top_k > 0 or args.top_p < 1 or args.min_p > 0
    surprise = "cross_entropy" if filtered else "entropy"
    per_function = rewards.per_function.mean((0, 1)).tolist()
    return {
        "step": step,
        "reward": total.mean().item(),
        "reward_std": total.std(-1).mean().item(),
        **{f"rewards/{name}": value for name, value in zip(rewards.names, per_function)},
        **update,
        surprise: -rollouts.logprobs.sum().item() / tokens,
        "completion_length": tokens / total.numel(),
        "truncated": (~rollouts.finished).float().mean().item(),
        **truncated_thinking(rollouts, setup),
        "flat_groups": 1 - has_signal(total).float().mean().item(),
        "tokens_per_second": tokens / seconds["sampling"],
        **sampled_counts(rollouts, total),
        **referee_metrics(setup),
        **{f"seconds/{stage}": spent for stage, spent in seconds.items()},
        **({"peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9} if on_gpu else {}),
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
    if bar.disable:  # no terminal: a line instead
        seconds = sum(value for key, value in metrics.items() if key.startswith("seconds/"))
        left = seconds * (bar.total - step - 1)
        bar.write(f"step {step + 1}/{bar.total}: {bar_text(shown)}; {seconds:.0f} s, "
                  f"{in_words(left)} left at this pace")  # fmt: skip


def bar_text(values):
    return ", ".join(f"{name} {value}" for name, value in values.items())


def summary_table(path, before, after):
    """What a run ends with: the held-out figures before and after, its budget, where to look."""
    files = (path / name for name in ("metrics.jsonl", "eval.jsonl", "short_eval.jsonl"))
    rows = [row for file in files for row in read_rows(file)]
    return "\n".join([
        "", *evaluation_table({"before GRPO": before, "after": after}), *budget_lines(rows),
        f"Everything is in {path}; {path}/plots/overview.png shows it at a glance.",
        f"The model loads with AutoModelForCausalLM.from_pretrained({str(path / 'model')!r}).",
        f"The report, to open in a browser: {path / REPORT}",
    ])  # fmt: skip
