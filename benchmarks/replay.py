"""What different objectives would make of the same rollouts: their gradients, without sampling.

    python main.py --preset cpu --save_rollouts --output_dir runs/a
    python benchmarks/replay.py runs/a

While the model is the one that sampled, every ratio is 1: nothing is clipped, and objectives that
differ in ratio or clip alone have one and the same gradient. They part when the model has moved on
since, as it has in the second inner epoch, or where sampling runs ahead of training. So by default
the run's final model looks back at the first, the middle and the last step saved: rollouts that are
all, half and one of the run's updates old. --model CHECKPOINT is another place to look from, and
--step other rollouts. The point where nothing has moved is computed first where there is a model
for it, checkpoints/step_N for the rollouts of step N, or the initial model for those of step 0 if
there was no cold start: there the table shows aggregation and advantages alone.

Per point: `mismatch`, how far the model is from the sampler (mean |log-prob now - log-prob then|,
nats per token). Per objective: the norm of the gradient, the share of tokens that the clip bounds
(for gspo those of whole completions; for cispo nothing is lost by it), and the cosine with every
other objective's gradient, which is what counts: AdamW does not see a norm that stays the same. A
norm of 0 (gspo, where its narrow bounds hold every completion) has no angle: nan, in JSON null.
The gradients are those of one update, without KL, bonus and gradient clipping; the run's other
flags stand. `tis` takes the model for the trainer before its first update: its ratio is 1, and all
that the model has moved is in the capped weight.

The last line is JSON.
"""

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from common import table

OBJECTIVES = {  # flags of main.py
    "grpo": {},
    "dapo": {"aggregation": "dapo", "clip_epsilon_high": 0.28},
    "dr_grpo": {"aggregation": "dr_grpo", "advantage_scale": "none"},
    "rloo": {"baseline": "leave_one_out", "advantage_scale": "none"},
    "gspo": {"ratio": "sequence", "clip_epsilon": 3e-4, "clip_epsilon_high": 4e-4},
    "cispo": {
        "clip": "cispo",
        "aggregation": "dapo",
        "clip_epsilon": 1.0,
        "clip_epsilon_high": 4.0,
    },
    "tis": {"tis_cap": 2.0},
    "icepop": {"tis_cap": 5.0, "tis_floor": 0.5, "tis_form": "token_mask"},
    "mis": {"tis_cap": 3.0, "tis_form": "sequence_mask"},
    "dual_clip": {"clip_delta": 4.0},
    "sapo": {"clip": "sapo"},
    "gmpo": {"clip": "gmpo", "clip_epsilon": 0.4, "clip_epsilon_high": 0.4},
    "batch_std": {"advantage_scale": "batch_std"},
    "max_rl": {"advantage_scale": "max_rl"},
    "gdpo": {"advantage_scale": "gdpo"},
}
PLAIN = {  # what every objective starts from, whatever the run had
    "aggregation": "grpo", "advantage_scale": "std", "baseline": "mean", "ratio": "token",
    "clip": "ppo", "clip_epsilon": 0.2, "clip_epsilon_high": 0.2, "clip_delta": 0.0, "tis_cap": 0.0,
    "tis_floor": 0.0, "tis_form": "token_truncate", "kl_beta": 0.0, "entropy_bonus": 0.0,
    "num_inner_epochs": 1, "max_grad_norm": 0.0,
}  # fmt: skip
BLOCK = 2**22  # numbers that are fp64 at once
ROLLOUTS, CHECKPOINTS = "rollouts", "checkpoints"


def main(argv=None):
    from utils import UserError, finite

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("run", type=Path, help="a run's directory, made with --save_rollouts")
    flag("--step", type=int, nargs="+", help="of the rollouts; default: first, middle, last saved")
    flag("--model", help="a model's directory; default: RUN/model")
    flag("--objective", default=",".join(OBJECTIVES), help="names, with commas between them")
    args = parser.parse_args(argv)
    try:
        points = replay(args)
    except UserError as error:
        parser.exit(2, f"replay.py: error: {error}\n")
    print(json.dumps(finite({"run": str(args.run), "points": points})))


def replay(args):
    """Print a table per point (rollouts and model); returns what goes into the last line."""
    from utils import UserError

    names = args.objective.split(",")
    for name in names:
        if name not in OBJECTIVES:
            raise UserError(f"--objective {name}: not one of {', '.join(OBJECTIVES)}")
    flags = flags_of(args.run)
    files = {int(path.stem.removeprefix("step_")): path
             for path in sorted((args.run / ROLLOUTS).glob("step_*.safetensors"))}  # fmt: skip
    if not files:
        raise UserError(f"{args.run}: no {ROLLOUTS}/ there; train with --save_rollouts")
    saved = list(files)
    steps = args.step or sorted({saved[0], saved[len(saved) // 2], saved[-1]})
    for step in steps:
        if step not in files:
            raise UserError(f"--step {step}: not saved; there are {saved[0]} to {saved[-1]}")
    later = args.model or str(args.run / "model")
    if not Path(later).is_dir():
        raise UserError(f"--model {later}: no such directory; name a checkpoint of the run")
    places = [(step, model) for step in steps if (model := sampler_of(args.run, step, flags))]
    places += [(step, later) for step in steps if (step, later) not in places]
    return [point(files[step], step, model, names, flags) for step, model in places]


def flags_of(run):
    """The run's flags, and today's defaults for those that it did not know."""
    from launch.parser import build_parser
    from utils import UserError

    try:
        flags = json.loads((run / "config.json").read_text(encoding="utf-8"))["flags"]
        defaults = vars(build_parser(flags["preset"], flags["dataset_name"]).parse_args([]))
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{run}: no run there, or its config.json is damaged") from None
    return {**defaults, **flags}


def sampler_of(run, step, flags):
    """The model that wrote a step's rollouts, None where it was not kept."""
    checkpoint = run / CHECKPOINTS / f"step_{step:05d}"
    if checkpoint.is_dir():
        return str(checkpoint)
    return flags["model_name"] if step == 0 and flags["cold_start_steps"] == 0 else None


def point(file, step, model, names, flags):
    """The table of one place to look from; returns its figures."""
    from llms import load_model
    from records.rollout_file import load_rollouts
    from training.processes import make_accelerator
    from utils import UserError

    accelerator = make_accelerator()
    policy, _ = load_model(model, accelerator.device)
    rollouts, rewards, _, chosen = load_rollouts(file, accelerator.device)
    if rewards.weights is None and "gdpo" in names:
        raise UserError(f"{file}: an older file, without the weights of the rewards, which gdpo "
                        "needs; leave it out by --objective")  # fmt: skip
    print(f"\nrollouts of step {step}, seen by {model}", flush=True)
    gradients, clipped = {}, {}
    for name in names:
        settings = SimpleNamespace(**{**flags, **PLAIN, **OBJECTIVES[name]})
        gradients[name], metrics = gradient(
            policy, rollouts, rewards, chosen, settings, accelerator
        )
        clipped[name] = metrics.get("clip_fraction", 0.0)
    norms = {name: product(gradients[name], gradients[name]) ** 0.5 for name in names}
    figures = {
        name: {
            "norm": norms[name],
            "clip_fraction": clipped[name],
            "cosine": {
                other: product(gradients[name], gradients[other]) / scale if scale else math.nan
                for other in names
                for scale in [norms[name] * norms[other]]
            },
        }
        for name in names
    }
    mismatch = metrics.get("mismatch", 0.0)
    print(f"mismatch {mismatch:.2g} nats per token\n")
    print(table([("", "norm", "clipped", *(f"cos {name}" for name in names))] + [
        (name, f"{row['norm']:.4g}", f"{row['clip_fraction']:.1%}",
         *(f"{value:.3f}" for value in row["cosine"].values()))
        for name, row in figures.items()
    ]), flush=True)  # fmt: skip
    return {"step": step, "model": model, "mismatch": mismatch, "objectives": figures}


def gradient(policy, rollouts, rewards, chosen, settings, accelerator):
    """One objective's gradient, (weights,) in host memory, and metrics.

    The ratio compares with what sampled, for the policy may have moved since.
    """
    import torch

    from evaluation.scoring import advantages_of
    from grpo import grpo_loss
    from training.logprobs import completion_logprobs
    from training.setup import Setup
    from training.update import cut, objective_of
    from utils import UserError

    advantages = advantages_of(rewards, settings, chosen)
    setup = Setup(policy, None, None, settings, accelerator)
    on_device = (x.to(policy.device) for x in (advantages, chosen))
    passes, _, tokens = cut(setup, rollouts, *on_device)
    policy.zero_grad()
    metrics = {}
    for one in passes:
        with accelerator.autocast():
            logprobs, _ = completion_logprobs(policy, one.read, one.ids, settings.temperature)
        batch = replace(one.batch, old_logprobs=one.batch.sampled_logprobs)
        loss, sums = grpo_loss(logprobs, batch, objective_of(settings))
        loss.backward()
        gaps = (logprobs.detach() - batch.sampled_logprobs).masked_fill(batch.weights == 0, 0)
        for name, value in {**sums, "mismatch": gaps.abs().sum()}.items():
            metrics[name] = metrics.get(name, 0.0) + (value / tokens).item()
    found = torch.cat([
        (torch.zeros_like(p) if p.grad is None else p.grad).flatten().cpu()
        for p in policy.parameters()
    ])  # fmt: skip
    policy.zero_grad()
    if not torch.isfinite(found).all():
        raise UserError(f"--model {policy.name_or_path}: too far from the sampler, a gradient is "
                        "not finite")  # fmt: skip
    return found, metrics


def product(a, b):
    """The inner product of two gradients, summed in fp64: in fp32 it is off by a hundredth."""
    parts = zip(a.split(BLOCK), b.split(BLOCK))
    return sum((x.double() @ y.double()).item() for x, y in parts)


if __name__ == "__main__":
    main()
