"""Checkpoints: written whole or not at all, found again, and one of the last step however it ends.

A checkpoint is a directory, e.g. runs/demo/checkpoints/step_00100:

    model.safetensors, config.json, tokenizer.json, ...   the policy, in Hugging Face format
    optimizer.pt             AdamW's moments
    reference.safetensors    what the KL term compares with, where there is one
    manifest.json            step, flags and data, and the size and SHA-256 of every other file

Nothing else is needed to go on: questions, samples and learning rate are functions of the seed and
the step. The reference is in every checkpoint, moving or not, so that each is complete by itself.
With LoRA, policy and reference are adapters alone, and --model_name has the rest:
adapter_model.safetensors and adapter_config.json stand in place of the model's files.
"""

import errno
import json
import os
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_model
from tqdm import tqdm

from llms import load_model as load_whole_model
from llms import rendering_of
from records.exports import load_weights, write_for_others
from records.manifest import damage, fingerprints, manifest_text
from records.resuming import MANIFEST, check_same_flags, checkpoint_step, checkpoints_in
from training.lora import ADAPTER, has_adapter, load_adapter, save_adapter, trained_parameters
from training.processes import everyones, patient
from training.progress import progress
from training.sharding import is_sharded, like, whole_state
from utils import SIGNALS, Stopped, UserError, hub_token, parameters_of
from vision.sight import save_reader

OPTIMIZER, REFERENCE = "optimizer.pt", "reference.safetensors"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SKIPS = 3  # updates in a row that are not finite, after which a run ends
SMALL_FILES = 2**25  # bytes: an allowance for tokenizer and configuration


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are as they were written."""

    step: int  # steps done
    path: Path
    data: dict  # what the run's problems are, see loading.load
    loss_scale: dict  # see precision.LossScale; {} in a run of before there was one


def checkpoint_to_resume(args):
    """The newest whole Checkpoint of the run, from --resume PATH on backwards. None for a new run
    and for one that has no checkpoint yet. A damaged one is named and passed over.

    Raises UserError where all are damaged, the flags are not the run's, or it has done more than
    --num_train_iters steps.
    """
    if args.resume is None:
        return None
    folder = Path(args.output_dir) / "checkpoints"
    last = checkpoint_step(args.resume)
    found = [pair for pair in checkpoints_in(folder) if last is None or pair[0] <= last]
    for step, path in found:
        with progress.shown(f"reading {path.name}"):
            problem = damage(path)
        if problem:
            line = f"main.py: warning: checkpoint {path} is passed over: {problem}"
            tqdm.write(line, file=sys.stderr)
            continue
        if step > args.num_train_iters:
            raise UserError(f"--num_train_iters {args.num_train_iters}: {path} has done more steps")
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        check_same_flags(args, manifest["flags"])
        tqdm.write(f"going on from {path}")
        return Checkpoint(step, path, manifest["data"], manifest.get("loss_scale", {}))
    if found:
        raise UserError(f"--resume: no whole checkpoint is left in {folder}; start anew with "
                        "another --output_dir")  # fmt: skip
    tqdm.write(f"no checkpoint in {folder} yet: starting from the beginning")
    return None


def _write_moments(moments, path):
    with open(path, "wb") as file:
        torch.save(moments, file)


def _disk_full(error):
    if isinstance(error, SafetensorError):  # which has the number in its text alone
        return any(f"(os error {number})" in str(error) for number in DISK_FULL)
    return isinstance(error, OSError) and error.errno in DISK_FULL


def _flush(path):
    """Have a file or a directory on the disk itself, and later reads come from there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _new(path):
    """The name under which a directory is written before it gets its own."""
    return path.with_name(path.name + ".new")


def _discard(path):
    """Remove a directory, which first loses its name: no half of it is ever taken for whole."""
    if path.exists():
        dying = path.with_name(path.name + ".old")
        shutil.rmtree(dying, ignore_errors=True)
        os.replace(path, dying)
        shutil.rmtree(dying)


class Saver:
    """Writes the run's checkpoints, and sees to it that the last completed step is not lost.

    `with saver:` turns SIGINT and SIGTERM into Stopped, raised wherever the run is at that moment,
    and whatever leaves the block early, a signal or an error, has the last completed step saved. A
    second signal ends the process at once.

    Weights change in place, so there is one time at which those in memory are of no step: from an
    optimizer's first change (`hold`, which the optimizer itself calls) over further inner epochs
    and the reference to the step's line in the log (`completed`). A signal waits until then, and
    after an error in between nothing is saved. At any other time, sampling, rewards, the backward
    pass and evaluation included, they are those of the last completed step: what is under way can
    be dropped, because the step is computed again from its number.
    """

    def __init__(self, setup, optimizer, data, start=None):
        """`data`: facts of the problems, for the manifest. `start`: the Checkpoint that policy,
        reference and optimizer are set to, if any.

        Later ones are removed. Of several processes the main one alone writes. The others do not
        heed a signal, so that none leaves it waiting for good; where the policy is sharded, all
        heed it together, after the step, since it takes all of them to save.
        """
        self.args, self.policy, self.tokenizer = setup.args, setup.policy, setup.tokenizer
        self.reference, self.optimizer, self.data = setup.reference, optimizer, data
        self.adapted = has_adapter(self.policy)
        self.run_path = Path(self.args.output_dir)
        self.folder = self.run_path / "checkpoints"
        self.done = self.on_disk = 0  # steps: completed, and in the newest checkpoint
        self.held, self.signal, self.handlers = False, None, {}
        self.skips, self.loss_scale = 0, setup.loss_scale  # skips in a row
        self.accelerator, self.sharded = setup.accelerator, is_sharded(self.policy)
        self.main = self.accelerator.is_main_process
        if start is not None:
            self._restore(start)
        optimizer.register_step_pre_hook(lambda *_: self.hold())
        if not self.main:
            return
        for step, path in checkpoints_in(self.folder):
            if step > self.done:
                _discard(path)
        for path in (*self.folder.glob("*.new"), *self.folder.glob("*.old")):
            shutil.rmtree(path)  # what a process that died left

    def _restore(self, start):
        device = self.policy.device
        try:
            load = load_adapter if self.adapted else load_weights
            weights = ADAPTER if self.adapted else "model.safetensors"
            load(self.policy, start.path / weights, device=str(device))
            if self.reference is not None:
                load(self.reference, start.path / REFERENCE, device=str(device))
            moments = torch.load(start.path / OPTIMIZER, map_location=device, weights_only=True)
            groups = self.optimizer.state_dict()["param_groups"]  # rates are those of the flags
            if self.sharded:
                for parameter, state in zip(parameters_of(self.optimizer), moments.values()):
                    for name in ("exp_avg", "exp_avg_sq"):
                        state[name] = like(state[name], parameter)
            self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        except (RuntimeError, ValueError, OSError, KeyError) as error:
            raise UserError(f"--resume: {start.path} does not fit --model_name "
                            f"{self.args.model_name}: {str(error)[:80]!r}") from None  # fmt: skip
        vars(self.loss_scale).update(start.loss_scale)
        self.done = self.on_disk = start.step

    # --- signals and errors

    def __enter__(self):
        self.handlers = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def _on_signal(self, number, frame):
        if self.signal is not None:
            os.write(2, b"\nmain.py: ended at once; what was being saved is not\n")
            os._exit(128 + number)
        self.signal = number
        if self.main and not (self.held or self.sharded):
            signal.setitimer(signal.ITIMER_REAL, 0)  # of a reward function's time limit
            raise Stopped(number)

    def hold(self):
        """From here on the weights are of no step, or files are being written: signals wait."""
        self.held = True

    def _release(self, together=False):
        self.held = False
        heeded = together or (self.main and not self.sharded)
        if self.signal is not None and heeded:  # it waited, or something swallowed its exception
            raise Stopped(self.signal)

    def completed(self, done, skipped=0):
        """The weights, the reference and the log are now those of `done` steps.

        Raises UserError where this is one of several steps in a row whose update was `skipped`.
        """
        self.done = done
        if self.sharded:
            self.signal = next(filter(None, everyones(self.signal, self.accelerator)), None)
        self.skips = self.skips + 1 if skipped and self.loss_scale.scale == 1 else 0
        self._release(together=self.sharded)
        if self.skips == SKIPS:
            raise UserError(f"loss or gradient not finite in {SKIPS} steps in a row, all skipped"
                            f"{self._whole()}; lower --learning_rate in a new run")  # fmt: skip

    def _whole(self):
        """What a message says of the newest checkpoint."""
        return f"; step_{self.on_disk:05d} is whole" if self.on_disk else ""

    def __exit__(self, kind, error, trace):
        stopped = self.signal
        full = _disk_full(error)
        worth = (self.done or self.args.cold_start_steps) and not (self.held or full)
        worth = worth and (isinstance(error, Stopped) or not self.sharded)
        if error is not None and worth:
            try:
                self._save(prune=isinstance(error, Stopped))  # after an error, all are kept
            except Stopped:
                pass
            except UserError as failure:
                tqdm.write(f"main.py: error: {failure}", file=sys.stderr)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if full:
            raise UserError(f"{self.run_path}: no room to write{self._whole()}; make some, then go "
                            "on by --resume") from None  # fmt: skip
        if error is not None and stopped is not None and not isinstance(error, Stopped):
            raise Stopped(stopped) from error  # something on the way made another error of it

    # --- writing

    def save(self):
        """Write the last completed step as a checkpoint; all processes wait until it is written."""
        with patient(self.accelerator):
            self._save()
            self.accelerator.wait_for_everyone()

    def _save(self, prune=True):
        """Write the last completed step as a checkpoint, where it is not one yet.

        Then the oldest but --keep_checkpoints are removed. Raises UserError where it could not be
        written; the earlier ones are left as they are.
        """
        target = self.folder / f"step_{self.done:05d}"
        there = self.on_disk == self.done and target.exists()
        if self.sharded:  # it takes all of them to gather it
            there = everyones(there, self.accelerator)[0]
        state = None if there else whole_state(self.policy, self.optimizer, self.main)
        if not self.main:
            self.on_disk = self.done
            return
        self.hold()
        if state:
            try:
                with progress.shown("saving"):
                    self._write(target, *state)
            except (OSError, RuntimeError, SafetensorError) as error:
                shutil.rmtree(_new(target), ignore_errors=True)
                reason = getattr(error, "strerror", None) or str(error)
                raise UserError(f"checkpoint {target.name} not written: {reason[:70]}"
                                f"{self._whole()}; mend that, then --resume") from None  # fmt: skip
            self.on_disk = self.done
        if prune:
            for _, path in checkpoints_in(self.folder)[self.args.keep_checkpoints :]:
                _discard(path)
        self._release()

    def _write(self, target, weights, moments):
        new = _new(target)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        reference = [] if self.reference is None else trained_parameters(self.reference)
        tensors = [*(weights.values() if weights else trained_parameters(self.policy)), *reference]
        tensors += [tensor for state in moments.values() for tensor in state.values()]
        needed = sum(tensor.nbytes for tensor in tensors) + SMALL_FILES
        free = shutil.disk_usage(new).free
        if free < needed:
            raise OSError(f"it needs {needed:,} bytes of disk, {free:,} are free")
        with ThreadPoolExecutor(1) as side:  # the moments are two thirds of the bytes
            written = side.submit(_write_moments, moments, new / OPTIMIZER)
            self._write_models(new, weights)
            written.result()
        manifest = {
            "step": self.done,
            "flags": vars(self.args),
            "loss_scale": vars(self.loss_scale),
            "data": self.data,
            "files": fingerprints(sorted(new.iterdir())),
        }
        (new / MANIFEST).write_text(manifest_text(manifest), encoding="utf-8")
        with ThreadPoolExecutor() as pool:
            list(pool.map(_flush, (*new.iterdir(), *self.run_path.glob("*.jsonl"))))
        _flush(new)
        _discard(target)  # a damaged one of this step
        os.replace(new, target)
        for path in (self.folder, self.run_path):
            _flush(path)
        if problem := damage(target):
            raise OSError(f"read back, {problem}")

    def _write_models(self, new, weights):
        if self.adapted:
            save_adapter(self.policy, new / ADAPTER)
        else:
            self.policy.save_pretrained(new, state_dict=weights, max_shard_size="1TB")  # one file
        save_reader(self.tokenizer, new)
        write_for_others(new)
        if self.reference is not None:
            save = save_adapter if self.adapted else save_model
            save(self.reference, new / REFERENCE)

    def publish(self):
        """The newest checkpoint's model alone as `model/`, sharing its files on the disk.

        With --merge_lora, the whole model with the checkpoint's adapter folded in.
        """
        self.save()
        if not self.main:
            return
        target, checkpoint = self.run_path / "model", self.folder / f"step_{self.done:05d}"
        new = _new(target)
        shutil.rmtree(new, ignore_errors=True)
        if self.adapted and self.args.merge_lora:
            rendering = rendering_of(self.args)
            model, tokenizer = load_whole_model(str(checkpoint), "cpu", hub_token(), rendering)
            model.save_pretrained(new)
            save_reader(tokenizer, new)
            write_for_others(new)
            for path in new.iterdir():
                _flush(path)
        else:
            shutil.copytree(
                checkpoint, new, copy_function=_link,
                ignore=shutil.ignore_patterns(OPTIMIZER, REFERENCE, MANIFEST),
            )  # fmt: skip
        _flush(new)
        _discard(target)
        os.replace(new, target)
        _flush(self.run_path)


def _link(source, target):
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy(source, target)
