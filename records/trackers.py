"""A run's figures sent to TensorBoard, Weights & Biases or Trackio (--track), through accelerate.

They get what the run writes to its own files, at the same steps and under the same names: the lines
of metrics.jsonl and eval.jsonl, some held-out answers, the alarms and the PNGs. What an evaluation
calls as a step does (completion_length, say) gets `eval/` in front. The files remain the record: a
tracker that fails is left out from then on.
"""

import sys
from pathlib import Path
from textwrap import indent

import numpy as np
from PIL import Image
from tqdm import tqdm

from utils import UserError, finite, one_line

PROJECT = "grpo"  # and TensorBoard's directory in that of the run
ALSO_OF_A_STEP = ("alarms", "completion_length", "truncated", "rewards/")
ANSWERS = 8  # held-out answers to show of an evaluation
COLUMNS = ("question", "answer", "parsed", "correct", "completion")


def start_trackers(accelerator, args, first):
    """Start what the accelerator was told to log with. Returns accelerate's trackers, in the main
    process; none in any other.

    first: the step that the run begins with. Where it goes on there, TensorBoard hides what was
    logged later before, and the others start a run of the same name. Raises UserError where a
    tracker cannot be started.
    """
    name = Path(args.output_dir).resolve().name
    settings = {
        "tensorboard": {"purge_step": first},
        "wandb": {"name": name, "group": name, "dir": args.output_dir},
        "trackio": {"name": name, "group": name},
    }
    flags = {flag: _plain(value) for flag, value in vars(args).items()}
    try:
        accelerator.init_trackers(PROJECT, flags, settings)
    except Exception as error:  # libraries of many layers, each with errors of its own
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise UserError(f"--track {' '.join(args.track)}: cannot be started: {reason}") from None
    return accelerator.trackers


def log_row(trackers, row):
    """Log a line of metrics.jsonl: its numbers as they are, its alarms, if any, as text."""
    values = {
        name: "\n".join(value) if isinstance(value, list) else value
        for name, value in finite(row).items()
        if name != "step" and value not in (None, [])
    }
    _send(trackers, lambda tracker: tracker.log(values, step=row["step"]))


def log_evaluation(trackers, row, records=()):
    """Log a line of eval.jsonl, and the first of its records."""
    if not trackers:
        return
    names = {name: f"eval/{name}" if name.startswith(ALSO_OF_A_STEP) else name for name in row}
    log_row(trackers, {names[name]: value for name, value in row.items()})
    answers = [[record[name] for name in COLUMNS] for record in records[:ANSWERS]]
    text = "\n\n".join(
        "\n".join(f"{name}: {value}" for name, value in zip(COLUMNS, answer)) for answer in answers
    )

    def send(tracker):
        if hasattr(tracker, "log_table"):
            tracker.log_table("answers", list(COLUMNS), answers, step=row["step"])
        else:  # indented, for Markdown to leave it as it is
            tracker.log({"answers": indent(text, "    ")}, step=row["step"])

    if answers:
        _send(trackers, send)


def log_plots(trackers, step, folder):
    """Log the PNGs in a directory, as plots/NAME, with those trackers that take images."""

    def send(tracker):
        if not hasattr(tracker, "log_images"):
            return
        axes = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        for file in sorted(folder.glob("*.png")):
            image = np.asarray(Image.open(file).convert("RGB"))[None]  # (1, H, W, 3)
            tracker.log_images({f"plots/{file.stem}": image}, step=step, **axes)

    _send(trackers, send)


def finish_trackers(trackers):
    _send(trackers, lambda tracker: tracker.finish())


def _send(trackers, send):
    """Call `send` with every tracker. One that raises is told of, and left out from then on."""
    for tracker in list(trackers):
        try:
            send(tracker)
        except Exception as error:  # the network, a full disk, whatever: the run goes on
            trackers.remove(tracker)
            line = f"warning: --track {tracker.name} is left out from here on: {error}"
            tqdm.write(one_line(f"main.py: {line}"), file=sys.stderr)


def _plain(value):
    """A flag's value as every tracker takes it: lists, dicts and None as text."""
    return value if isinstance(value, bool | int | float | str) else str(value)
