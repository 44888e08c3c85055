"""The memory that `--plan` predicts against what a real step takes, a process for each figure.

A worker takes two steps of training on the CPU in fp32, every completion of full length, with
random weights: SmolLM2-135M and a Qwen2 of four layers. One counts the tensors as they come and go;
another, which counts nothing, says by how much its resident memory grew from before the model,
which is compared with the plan's tensors and its allowance for gaps between them.

    python benchmarks/plan_vs_real.py

The last line is JSON: per model GB predicted, of tensors and resident, and predicted / real.
"""

import json
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

from common import Worker, peak_gib, reply_channel, table

FLAGS = [
    "--plan", "--preset", "cpu", "--max_prompt_length", "128", "--questions_per_step", "4",
    "--group_size", "4", "--kl_beta", "0.04", "--eval_batch_size", "1", "--precision", "fp32",
]  # fmt: skip
QWEN2 = {
    "model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 4, "intermediate_size": 4864,
    "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 32000,
    "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip


def main():
    from launch.planner import ALLOWANCE

    results, gaps = {}, ALLOWANCE["cpu"]["gaps"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(QWEN2))
        for name, model_name in (("smollm2", "smollm2-135m"), ("qwen2 of 4 layers", folder)):
            gb = {}
            for what in ("predicted", "tensors", "resident"):
                worker = Worker(__file__, ["--model_name", model_name], what)
                gb[what] = worker.answer()
                worker.close()
                print(f"{name}: {what} {gb[what]:.3f} GB", flush=True)
            gb["predicted / tensors"] = gb["predicted"] / gb["tensors"]
            gb["predicted / resident"] = gb["predicted"] / gb["resident"]
            gb["with gaps / resident"] = gb["predicted / resident"] * (1 + gaps)
            results[name] = {key: round(value, 3) for key, value in gb.items()}
    print(table([("GB", *gb), *((name, *row.values()) for name, row in results.items())]))
    print(json.dumps(results))


def work(model_name, what):
    """One worker: a figure in GB."""
    reply = reply_channel()
    from utils import keep_freed_memory

    keep_freed_memory()
    import torch
    from accelerate import Accelerator
    from transformers import AutoModelForCausalLM

    from launch.fake_memory import Tracker
    from launch.parser import parse_args
    from launch.planned_step import config_of, planned

    args = parse_args([*FLAGS, "--model_name", model_name])
    if what == "predicted":
        return reply(planned(args, on_gpu=False).peak / 1e9)
    matrix = torch.ones(512, 512)
    (matrix @ matrix).sum()  # what the libraries need to begin with is not the step's
    before = resident()
    model = AutoModelForCausalLM.from_config(config_of(model_name), dtype=torch.float32).eval()
    tracker = Tracker() if what == "tensors" else None
    real_steps(model, args, Accelerator(cpu=True), tracker)
    if tracker is None:
        return reply(peak_gib() * 2**30 / 1e9 - before)
    return reply(max(sum(parts.values()) for parts in tracker.phases.values()) / 1e9)


def resident():
    """GB of resident memory now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) * 1024 / 1e9


def real_steps(model, args, accelerator, tracker=None):
    """Two steps of training and an evaluation of full length, by the functions that train.

    With a tracker, its phases are `sampling`, `update` and `evaluation`, those of the second step.
    """
    import torch

    from launch.planned_step import worst_prompts
    from llms import kl_reference
    from sampling.groups import sample_rollouts
    from training.lean_layers import recompute_layers
    from training.lora import add_adapter
    from training.optimizer import make_optimizer
    from training.setup import Setup
    from training.update import update_policy

    length, phase = args.max_completion_length, tracker.phase if tracker else nullcontext
    no_end = SimpleNamespace(  # no token is -1: every completion goes to the end
        eos_token_id=-1, pad_token_id=-1, batch_decode=lambda rows, **_: [""] * len(rows)
    )
    model.generation_config.eos_token_id = None
    advantages = torch.ones(args.questions_per_step, args.group_size)
    on_gpu = accelerator.mixed_precision == "bf16"
    add_adapter(model, args, on_gpu)
    if args.gradient_checkpointing:
        recompute_layers(model)
    with tracker or nullcontext():
        if tracker:
            tracker.label(model.parameters(), "weights")
        reference = kl_reference(model, args, on_gpu)
        optimizer, _ = make_optimizer(model, args)
        setup = Setup(model, no_end, None, args, accelerator, reference)
        for _ in range(2):
            with phase("sampling"), accelerator.autocast():
                rollouts = sample_rollouts(
                    model, no_end, worst_prompts(args.questions_per_step, args), args.group_size,
                    length, args.temperature, range(args.questions_per_step),
                )  # fmt: skip
            assert rollouts.completion_mask.all()
            with phase("update"):
                update_policy(setup, optimizer, rollouts, advantages)
        with phase("evaluation"), accelerator.autocast():
            sample_rollouts(model, no_end, worst_prompts(args.eval_batch_size, args), 1, length, 0)


if __name__ == "__main__":
    if "--worker" in sys.argv:
        work(sys.argv[2], sys.argv[4])
    else:
        main()
