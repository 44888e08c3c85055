"""Which run `--resume` means, how far it is, its flags, and those that it may change.

Only the standard library is imported here: the command line asks before torch is loaded.
"""

import difflib
import json
import re
from contextlib import suppress
from pathlib import Path

from utils import ADAPTER_CONFIG, UserError

LATEST = "latest"  # --resume without a path
MANIFEST, REPORT = "manifest.json", "report.html"
# Flags that a resumed run may change: how long it goes on, what it prints, evaluates and keeps, and
# those for memory, which leave the result as it is.
MAY_CHANGE = {
    "output_dir", "resume", "resume_or_start", "plan", "verbose", "num_train_iters",
    "eval_iterations", "short_eval_iterations", "save_steps", "save_rollouts", "keep_checkpoints",
    "reward_timeout", "vllm_python", "vllm_devices", "vllm_arguments", "vllm_transfer",
    "vllm_timeout", "sampling_batch_size", "micro_batch_tokens", "eval_batch_size",
    "gradient_checkpointing", "track", "merge_lora", "allow_changed_rewards", "reward_workers",
    "referee_url", "referee_anyway",
    # Where problems come from: that they are the same is checked by what they say.
    "dataset_path", "question_field", "answer_field", "solution_field", "train_split", "test_split",
}  # fmt: skip


def run_to_resume(resume, output_dir, may_start=False):
    """The directory of the run that `--resume` or `--resume PATH` means.

    Raises UserError where it holds no run, unless the run `may_start` there, and for another one
    than --output_dir names.
    """
    if resume == LATEST:
        if output_dir is None:
            raise UserError("--resume: which run? Name it with --output_dir DIR, or a checkpoint")
        if not (may_start or holds_run(output_dir)):
            raise UserError(f"--resume: {_what_is_there(output_dir)}")
        return output_dir
    path = Path(resume)
    if not path.is_dir():
        raise UserError(f"--resume {path}: no such directory; expected a checkpoint or a run"
                        f"{_nearest_run(path)}")  # fmt: skip
    run = path if checkpoint_step(path) is None else path.resolve().parent.parent
    if output_dir is not None and Path(output_dir).resolve() != run.resolve():
        raise UserError(
            f"--output_dir {output_dir}: --resume {path} is of another run; leave it out"
        )
    if not holds_run(run):
        raise UserError(f"--resume {path}: holds no run{_nearest_run(run)}")
    return str(run)


def holds_run(path):
    """Whether a directory holds a run's configuration or its checkpoints."""
    flags = {}
    with suppress(UserError):
        flags = saved_flags(path)
    return bool(flags) or (Path(path) / "checkpoints").is_dir()


def _what_is_there(name):
    """What stands in place of a run, and what to do. Raises UserError for a damaged config.json."""
    path, nearest = Path(name), _nearest_run(name)
    if (path / "config.json").is_file():
        try:
            json.loads((path / "config.json").read_text(encoding="utf-8"))
        except ValueError:  # else it is something else's, a model's say
            saved_flags(path)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        kind = "a file" if path.is_file() else "other files"
        return f"{name}: {kind} and no run there{nearest}; name another directory"
    return f"no run in {name}{nearest}; --resume_or_start, with a run's flags, begins one"


def _nearest_run(path):
    """What a message says of the run that `path` is inside of, or else of the one whose name is
    like its, of those beside it and in runs/; nothing where there is none."""
    path = Path(path)
    if path.parent != path and holds_run(path.parent):
        return f"; the nearest is {path.parent}"
    folders = (path.parent, Path("runs"))
    found = (file.parent for folder in folders for file in sorted(folder.glob("*/config.json")))
    names = {run.name: str(run) for run in found if holds_run(run)}
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.3)
    return f"; the nearest is {names[close[0]]}" if close else ""


def has_finished(args):
    """Whether a command that resumes a run would find nothing left to do in it: its last step is
    saved, published and reported."""
    if args.resume is None or args.plan:
        return False
    run, asked = Path(args.output_dir), checkpoint_step(args.resume)
    last = run / "checkpoints" / f"step_{args.num_train_iters:05d}" / MANIFEST
    merges = args.merge_lora and (run / "model" / ADAPTER_CONFIG).exists()
    left_out = asked is not None and asked < args.num_train_iters  # from there on, once more
    there = all(path.exists() for path in (last, run / "model", run / REPORT))
    return there and not (left_out or merges)


def checkpoints_in(folder):
    """The checkpoints in a directory as (step, path), newest first, whole or not."""
    found = [(checkpoint_step(path), path) for path in Path(folder).glob("step_*")]
    return sorted((pair for pair in found if pair[0] is not None), reverse=True)


def checkpoint_step(path):
    """The step that a checkpoint's name tells, e.g. 100 for step_00100; None for other names."""
    match = re.fullmatch(r"step_(\d{5,})", Path(path).name)
    return int(match[1]) if match else None


def saved_config(output_dir):
    """What config.json of the run in a directory holds, {} where there is none yet."""
    file = Path(output_dir) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        return {**config, "flags": {**config["flags"]}}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{file}: damaged; remove it and give --resume the run's flags") from None


def saved_flags(output_dir):
    """The flags of the run in a directory, {} where it has no config.json yet."""
    return saved_config(output_dir).get("flags", {})


def steps_with_other_rewards(saved, sources, step, allowed):
    """The steps from which on a run's rewards or verdicts were others: those in its config.json,
    and `step`, at which it goes on, where these `sources` differ from what is saved there.

    Raises UserError where they differ and that is not `allowed`.
    """
    # A run that goes on from before a change makes those steps again, with the rewards of now.
    steps = sorted({min(at, step) for at in saved.get("rewards_changed_at", [])})
    if all(saved.get(name, value) == value for name, value in sources.items()):
        return steps
    if not allowed:
        raise UserError("--resume: the rewards or is_correct are not those that the run began "
                        "with; undo the change, or add --allow_changed_rewards")  # fmt: skip
    return sorted({*steps, step})


def flags_of_model(path):
    """The flags of the run that a model's directory is of, RUN/model or one of RUN/checkpoints; {}
    where it is of none."""
    parents = Path(path).resolve().parents
    for run in parents[:2] if Path(path).is_dir() else ():
        with suppress(UserError):
            if flags := saved_flags(run):
                return flags
    return {}


def check_same_flags(args, saved):
    """Raise UserError for flags that differ from the `saved` ones and may not."""
    # That engine's draws depend on what is sampled together.
    may_change = MAY_CHANGE - (
        {"sampling_batch_size"} if getattr(args, "sampler", None) == "paged" else set()
    )
    differing = [
        f"--{name} (was {value})"
        for name, value in saved.items()
        if name not in may_change and hasattr(args, name) and getattr(args, name) != value
    ]
    if differing:
        raise UserError(f"--resume: the run has other flags: {', '.join(differing)[:85]}; leave "
                        "them out, or name another --output_dir")  # fmt: skip
