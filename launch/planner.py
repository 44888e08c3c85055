"""`python main.py plan`: what a run would take, before it takes it.

planned_step.py carries out one step without memory; here it is put into words, and flags are sought
that make it fit.
"""

import copy
import math
import time
from functools import partial
from importlib import util

import torch

from launch.fake_memory import Machine
from launch.planned_step import GSM8K_TEST, PHASES, planned
from training.precision import DTYPES, resolved
from training.progress import progress

GB = 1e9
PARTS = (
    "weights", "Adam", "reference", "gradients", "sampling copy", "KV cache", "logits",
    "activations",
)  # fmt: skip
UPDATE = ("reference", "policy")  # phases that --micro_batch_tokens is for
CARDS = (24, 40, 80)  # GB
# How far a plan goes to make a run fit.
SMALLEST_MICRO_BATCH, SMALLEST_EVAL_BATCH, LORA_RANK = 2048, 16, 16

# What is not tensors is assumed: gaps that the allocator cannot fill, as a share of the tensors,
# and GB for libraries: Python's, or CUDA's context and cuBLAS's workspaces. The gaps on a CPU are
# between those of three measurements, 15 to 32 % (benchmarks/plan_vs_real.py).
ALLOWANCE = {"gpu": {"gaps": 0.05, "other": 1.0}, "cpu": {"gaps": 0.2, "other": 0.7}}

# Data sheet: 989 TFLOP/s in bf16 and 494 in TF32 (dense), 3.35 TB/s. What is reached of that, and
# what an operation costs the host and the device at least, as measured (docs/log.md, 2026-11-27).
H100 = Machine(
    name="H100 SXM, 50 % of 989 bf16 and 494 TF32 TFLOP/s, 75 % of 3.35 TB/s",
    flops={
        torch.bfloat16: 0.5 * 989e12,
        torch.float16: 0.5 * 989e12,
        torch.float32: 0.5 * 494e12,
    },
    bandwidth=0.75 * 3.35e12,
    least_seconds=4e-6,
    host_seconds=27e-6,
    overlaps=True,
)


def plan(args):
    """Print the plan of a run with these flags."""
    on_gpu = plans_for_gpu(args)
    with progress, progress.shown("planning"):
        precision = resolved(args.precision, on_gpu)
        machine = H100 if on_gpu else this_machine(DTYPES[precision])
        text = report(planned(args, on_gpu, machine), on_gpu, machine)
    print(text)


def plans_for_gpu(args):
    """The device a run would use: a GPU where there is one, and where the preset is made for one,
    so that one may plan on a laptop."""
    return torch.cuda.is_available() or args.preset != "cpu"


def this_machine(dtype=None):
    """The rates of this CPU, measured in a fraction of a second, and a share of them; of fp32 and
    of what is autocast to, if anything."""
    block = torch.ones(2**23)  # short calls, lest others interrupt
    copied = torch.empty_like(block)
    rates = {}
    for kind in {torch.float32, dtype} - {None}:
        matrix = torch.ones(512, 512, dtype=kind)
        rates[kind] = 2 * 512**3 / seconds_of(partial(torch.mm, matrix, matrix))
    products = rates[dtype or torch.float32]
    bandwidth = 2 * block.nbytes / seconds_of(lambda: copied.copy_(block))
    return Machine(
        name=f"this CPU at 70 % of the {products / 1e9:,.0f} GFLOP/s measured just now",
        flops={kind: 0.7 * rate for kind, rate in rates.items()},
        bandwidth=bandwidth,
        least_seconds=0.0,
        host_seconds=5e-6,
        overlaps=False,
    )


def seconds_of(function, spent=0.2):
    """The least time that a call took, over `spent` seconds of calls."""
    least, end = math.inf, time.perf_counter() + spent
    while (started := time.perf_counter()) < end:
        function()
        least = min(least, time.perf_counter() - started)
    return least


# --- the flags that make it fit ----------------------------------------------------------------


def fitting(first, on_gpu):
    """{card: (changed flags, peak with allowance)}; None for the flags, and a bound from below,
    where none are enough.

    Flags are changed one after the other, always for the phase that takes most. Where that is not
    enough, all over again with LoRA, and only then, without it, the KL term is given up: that
    changes the objective.
    """
    found, least = {}, []

    def change_from(changed, peaks):
        """Returns the flags changed at the end."""
        whatever = needed({"optimizer": peaks.get("optimizer", 0)}, on_gpu)  # no flag makes it less
        too_high = set()  # phases that were planned with flags of before, with which they took more
        while True:
            args = with_flags(first.args, changed)
            while (phase := max(peaks, key=peaks.get)) in too_high:
                peaks = {**peaks, **planned(args, on_gpu, phases=(phase,)).peaks}
                too_high.remove(phase)
            total = needed(peaks, on_gpu)
            fits = [card for card in CARDS if card not in found and total <= card * GB]
            found.update(dict.fromkeys(fits, (changed, total)))
            missing = [card for card in CARDS if card not in found]
            change = next_change(args, phase)
            if not missing or not change or whatever > missing[-1] * GB:
                least.append(whatever if change else total)
                return changed
            changed = {**changed, **change}
            too_high |= {"reference", "policy"} & {*peaks} if phase in UPDATE else {phase}

    changed = change_from({}, first.peaks)
    others = [{"lora_rank": LORA_RANK}] if can_use_lora(first.args) else []
    others += [{**changed, "kl_beta": 0.0}] if can_drop_kl(first.args) else []
    for other in others:
        if len(found) < len(CARDS):
            change_from(other, planned(with_flags(first.args, other), on_gpu).peaks)
    return {card: found.get(card) or (None, min(least)) for card in CARDS}


def with_flags(args, changed):
    args = copy.copy(args)
    vars(args).update(changed)
    return args


def can_use_lora(args):
    return not args.lora_rank and not args.update_ref_model and bool(util.find_spec("peft"))


def can_drop_kl(args):
    """With LoRA the reference takes nothing; one that moves is there for its own sake."""
    return args.kl_beta > 0 and not args.update_ref_model and not args.lora_rank


def next_change(args, phase):
    """The next flag to change where this phase takes most, {} where nothing is left."""
    step = args.questions_per_step * (
        args.max_prompt_length + args.group_size * args.max_completion_length
    )
    tokens = min(args.micro_batch_tokens or step, step)
    if phase == "evaluation" and args.eval_batch_size > SMALLEST_EVAL_BATCH:
        return {"eval_batch_size": max(args.eval_batch_size // 2, SMALLEST_EVAL_BATCH)}
    rows = args.questions_per_step * args.group_size
    at_once = min(args.sampling_batch_size or rows, rows)
    if phase == "sampling" and at_once > args.group_size:
        return {"sampling_batch_size": max(at_once // 2, args.group_size)}
    if phase in UPDATE:
        if tokens > SMALLEST_MICRO_BATCH:
            halved = 2 ** math.ceil(math.log2(tokens) - 1)  # to the next power of two
            return {"micro_batch_tokens": max(halved, SMALLEST_MICRO_BATCH)}
        if not args.gradient_checkpointing:
            return {"gradient_checkpointing": True}
    return {}


def needed(peaks, on_gpu):
    """Bytes that a device has to hold where phases peak at these."""
    allowance = ALLOWANCE["gpu" if on_gpu else "cpu"]
    return max(peaks.values()) * (1 + allowance["gaps"]) + allowance["other"] * GB


# --- in words ----------------------------------------------------------------------------------


def report(plan, on_gpu, machine):
    """The plan as text to read."""
    args, phases = plan.args, [phase for phase in PHASES if phase in plan.phases]
    gb = {phase: {part: plan.phases[phase][part] / GB for part in PARTS} for phase in phases}
    rows = [("peak memory, GB", *phases)]
    rows += [(part, *(f"{gb[phase][part]:.2f}" for phase in phases)) for part in PARTS]
    rows.append(("all tensors", *(f"{plan.peaks[phase] / GB:.2f}" for phase in phases)))
    seconds = {phase: plan.work[phase].predicted_seconds(machine) for phase in phases}
    rows += [
        ("tokens read", *(f"{plan.tokens.get(phase, 0):,}" for phase in phases)),
        ("operations, TFLOP", *(f"{plan.work[phase].flops / 1e12:,.1f}" for phase in phases)),
        ("predicted seconds", *(f"{seconds[phase]:,.2f}" for phase in phases)),
    ]
    step = sum(seconds[phase] for phase in phases if phase != "evaluation")
    evaluations = count_evaluations(args)
    run = args.num_train_iters * step + evaluations * seconds["evaluation"]
    precision = resolved(args.precision, on_gpu)
    device = f"{'a CUDA GPU' if on_gpu else 'the CPU'} in fp32"
    if precision != "fp32":
        device = device.replace("in fp32", f"under {precision} autocast")
    why = "there is one here" if torch.cuda.is_available() else f"--preset {args.preset}"
    allowance = ALLOWANCE["gpu" if on_gpu else "cpu"]
    lines = [
        f"{args.model_name}, {plan.parameters:,} parameters"
        + (f", {plan.trained:,} of them trained" if args.lora_rank else ""),
        f"On {device} ({why}).",
        *["Sampled from by the model's own layers (fallback sampler)."] * plan.falls_back,
        f"Worst case: all prompts have {args.max_prompt_length} tokens, all completions "
        f"{args.max_completion_length}.",
        "",
        *aligned(rows),
        "",
        f"Time, predicted and not measured: {step:,.1f} s per step, {duration(run)} for "
        f"{args.num_train_iters:,} steps and {evaluations:g} "
        f"evaluation{'s' * (evaluations != 1)}",
        f"of {args.eval_problems or GSM8K_TEST:,} problems, without rewards, cold start and files.",
        f"Assumed: {machine.name};",
        f"{machine.host_seconds * 1e6:.0f} microseconds for the host to start an operation"
        + (f", {machine.least_seconds * 1e6:.0f} for the device to do one." if on_gpu else "."),
        "",
        f"Memory, with {allowance['gaps']:.0%} for gaps and {allowance['other']} GB "
        f"for libraries: {needed(plan.peaks, on_gpu) / GB:.1f} GB.",
    ]
    for card, (changed, total) in fitting(plan, on_gpu).items():
        if changed is None:
            verdict = f"does not fit, whatever flags save memory: {total / GB:.1f} GB or more"
        elif changed:
            verdict = f"fits with {as_flags(changed)}: {total / GB:.1f} GB"
        else:
            verdict = "fits as it is"
        lines.append(f"  {card} GB: {verdict}")
    return "\n".join(lines)


def aligned(rows):
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:]))])
        for row in rows
    ]


def as_flags(changed):
    """{"kl_beta": 0.0} as it is typed."""
    return " ".join(
        f"--{name}" if value is True else f"--{name} {value:g}" for name, value in changed.items()
    )


def count_evaluations(args):
    """One before, one after, and those in between; short ones are an eighth."""
    if args.num_train_iters == 0:
        return 1
    every = args.eval_iterations or args.num_train_iters
    count = 1 + math.ceil(args.num_train_iters / every)
    if every := args.short_eval_iterations:
        count += ((args.num_train_iters - 1) // every + bool(args.cold_start_steps)) / 8
    return count


def duration(seconds):
    return f"{seconds / 3600:,.1f} h" if seconds > 5400 else f"{seconds / 60:,.0f} min"
