"""`python main.py --plan`: what a run would take, before it takes it.

One step is carried out on fake tensors, which have shapes and lifetimes but no memory (tracker.py),
by the functions that train: nothing of the model's arithmetic is repeated here. The plan is of the
worst case: every prompt as long as --max_prompt_length, every completion as long as
--max_completion_length, and of the prompts' beginnings one token in common.

Q questions per step, G completions per question, P prompt tokens, C completion tokens.
"""

import copy
import math
import time
import warnings
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import util
from unittest import mock
from weakref import WeakMethod

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

from decoder import Decoder
from flags import base_and_adapters
from graph_decoder import GraphDecoder, recorder_for
from grpo import grpo_loss
from known_models import KNOWN_MODELS
from llms import completion_logprobs, kl_reference, refusing
from lora import add_adapter, trained_parameters
from optimizer import make_optimizer
from sampler import sample_tokens
from shared_prefix import WITHOUT_GRADIENT, micro_batches
from tracker import Machine, Tracker
from utils import hub_token, parameters_of

GB = 1e9
PARTS = (
    "weights", "Adam", "reference", "gradients", "sampling copy", "KV cache", "logits",
    "activations",
)  # fmt: skip
PHASES = ("sampling", "reference", "policy", "optimizer", "evaluation")
CARDS = (24, 40, 80)  # GB
# How far a plan goes to make a run fit.
SMALLEST_MICRO_BATCH, SMALLEST_EVAL_BATCH, LORA_RANK = 2048, 16, 16
GSM8K_TEST = 1319  # problems in its official test split

# What is not tensors is assumed: gaps that the allocator cannot fill, as a share of the tensors,
# and GB for libraries: Python's, or CUDA's context and cuBLAS's workspaces. The gaps on a CPU are
# between those of three measurements, 15 to 32 % (benchmarks/plan_vs_real.py).
ALLOWANCE = {"gpu": {"gaps": 0.05, "other": 1.0}, "cpu": {"gaps": 0.2, "other": 0.7}}

# Data sheet: 989 TFLOP/s in bf16 and 494 in TF32 (dense), 3.35 TB/s. What is reached of that, and
# what an operation costs the host and the device at least, is as measured (LOG.md, 2026-11-27).
H100 = Machine(
    name="H100 SXM, 50 % of 989 bf16 and 494 TF32 TFLOP/s, 75 % of 3.35 TB/s",
    flops={torch.bfloat16: 0.5 * 989e12, torch.float32: 0.5 * 494e12},
    bandwidth=0.75 * 3.35e12,
    least_seconds=4e-6,
    host_seconds=27e-6,
    overlaps=True,
)


@dataclass(frozen=True)
class Plan:
    """What a run with these flags would take."""

    args: object
    parameters: int
    trained: int  # of these
    phases: dict  # phase: {part: bytes} at that phase's peak
    work: dict  # phase: Work of one step, for `evaluation` that of one evaluation
    tokens: dict  # phase: tokens that go through the model

    @property
    def peaks(self):
        return {phase: sum(parts.values()) for phase, parts in self.phases.items()}

    @property
    def peak(self):
        return max(self.peaks.values())


def plan(args):
    """Print the plan of a run with these flags."""
    on_gpu = plans_for_gpu(args)
    print("One step on tensors that have no memory, for a minute or two ...\n", flush=True)
    machine = H100 if on_gpu else this_machine()
    print(report(planned(args, on_gpu, machine), on_gpu, machine))


def plans_for_gpu(args):
    """The device a run would use: a GPU where there is one, and where the preset is made for one,
    so that one may plan on a laptop."""
    return torch.cuda.is_available() or args.preset != "cpu"


def planned(args, on_gpu, machine=None, layers=None):
    """The Plan of a run with these flags, from one step on fake tensors.

    machine: for the work, else there is none. layers: of the model, if not as many as it has.
    """
    with as_if(on_gpu):
        with refusing(
            f"--model_name {args.model_name}: cannot be planned, its config.json is damaged"
        ):
            config = config_of(args.model_name)
            config.num_hidden_layers = layers or config.num_hidden_layers
            # Some kinds read positions, which fake tensors do not have; of all, the shapes agree.
            rope_type = config.rope_parameters["rope_type"]
            config.rope_parameters["rope_type"] = "default"
            policy = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation="sdpa"
            )
            policy.config.rope_parameters["rope_type"] = rope_type  # for recorder_for
        return step_plan(policy.eval(), args, on_gpu, machine)


def config_of(model_name):
    """A model's configuration: known, or from its directory, or as flags.py fetched it."""
    base, _ = base_and_adapters(model_name)
    if base in KNOWN_MODELS:
        return AutoConfig.for_model(**KNOWN_MODELS[base])
    return AutoConfig.from_pretrained(base, token=hub_token())


def this_machine():
    """The rates of this CPU, measured in a fraction of a second, and a share of them."""
    matrix, block = torch.ones(512, 512), torch.ones(2**23)  # short calls, lest others interrupt
    copied = torch.empty_like(block)
    products = 2 * 512**3 / seconds_of(lambda: matrix @ matrix)
    bandwidth = 2 * block.nbytes / seconds_of(lambda: copied.copy_(block))
    return Machine(
        name=f"this CPU at 70 % of the {products / 1e9:,.0f} GFLOP/s measured just now",
        flops={torch.float32: 0.7 * products},
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


@contextmanager
def as_if(on_gpu):
    """Fake tensors, on the CPU whatever the plan is of: torch makes none on a GPU it does not have.

    The dtypes are those of CUDA, and so are the shapes. oneDNN, which cannot lay out a fake weight,
    is left out: its copy of a weight is as large as the plain one.
    """
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        stack.enter_context(mock.patch("torch.backends.mkldnn.is_available", lambda: False))
        stack.enter_context(mock.patch.object(torch.nn.Linear, "to", converted))
        if on_gpu:
            stack.enter_context(CudaAttention())
        stack.enter_context(FakeTensors())
        yield


def converted(module, *to, **more):
    """What Linear.to does; torch's own cannot exchange a fake weight that is referred to."""
    for name, parameter in list(module.named_parameters()):
        to_tensor = parameter.detach().to(*to, **more)
        setattr(module, name, torch.nn.Parameter(to_tensor, parameter.requires_grad))
    return module


class FakeTensors(FakeTensorMode):
    """A copy of a model has tensors of the same mode, not of a copy of it."""

    def __deepcopy__(self, memo):
        return self


class CudaAttention(TorchFunctionMode):
    """CUDA's attention wants the rows of a mask at multiples of 8 and else copies it, per layer,
    for the backward pass too (torch: ATen/native/transformers/attention.cpp, preprocess_mask)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        mask = kwargs.get("attn_mask") if func is F.scaled_dot_product_attention else None
        if mask is not None and any(stride % 8 for stride in mask.stride()[:-1]):
            width = mask.shape[-1]
            kwargs["attn_mask"] = F.pad(mask, (0, -width % 8))[..., :width]
        return func(*args, **kwargs)


# --- the flags that make it fit ----------------------------------------------------------------


def fitting(first, on_gpu):
    """{card: (changed flags, peak with allowance)}, None for the flags where none are enough.

    Flags are changed one after the other, always for the phase that takes most. Where that is not
    enough, all over again with LoRA, and only then, without it, the KL term is given up: that
    changes the objective.
    """
    found, ends = {}, []

    def change_from(changed):
        while missing := [card for card in CARDS if card not in found]:
            args = with_flags(first.args, changed)
            peaks = quick_peaks(args, on_gpu) if changed else first.peaks
            if changed and needed(peaks, on_gpu) <= missing[-1] * GB:
                peaks = planned(args, on_gpu).peaks  # the quick ones may be too low
            total = needed(peaks, on_gpu)
            found.update({card: (changed, total) for card in missing if total <= card * GB})
            change = next_change(args, max(peaks, key=peaks.get))
            if not change:
                ends.append(changed)
                return
            changed = {**changed, **change}

    change_from({})
    if can_use_lora(first.args):
        change_from({"lora_rank": LORA_RANK})
    if ends and can_drop_kl(first.args):
        change_from({**ends[0], "kl_beta": 0.0})
    if missing := [card for card in CARDS if card not in found]:
        in_full = (planned(with_flags(first.args, end), on_gpu).peaks for end in ends[1:] or ends)
        least = min(needed(peaks, on_gpu) for peaks in in_full)
        found.update(dict.fromkeys(missing, (None, least)))
    return {card: found[card] for card in CARDS}


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
    if phase in ("reference", "policy"):
        if tokens > SMALLEST_MICRO_BATCH:
            halved = 2 ** math.ceil(math.log2(tokens) - 1)  # to the next power of two
            return {"micro_batch_tokens": max(halved, SMALLEST_MICRO_BATCH)}
        if not args.gradient_checkpointing:
            return {"gradient_checkpointing": True}
    return {}


def quick_peaks(args, on_gpu):
    """Each phase's peak or less, in a tenth of the time: as it goes on from two to three layers.
    All layers take the same, but with more of them another moment may be the one that takes most.
    """
    two, three = (planned(args, on_gpu, layers=layers).peaks for layers in (2, 3))
    more = config_of(args.model_name).num_hidden_layers - 2
    return {phase: two[phase] + more * (three[phase] - two[phase]) for phase in two}


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
    device = "a CUDA GPU under bf16 autocast" if on_gpu else "the CPU in fp32"
    why = "there is one here" if torch.cuda.is_available() else f"--preset {args.preset}"
    allowance = ALLOWANCE["gpu" if on_gpu else "cpu"]
    lines = [
        f"{args.model_name}, {plan.parameters:,} parameters"
        + (f", {plan.trained:,} of them trained" if args.lora_rank else ""),
        f"On {device} ({why}).",
        f"Worst case: all prompts have {args.max_prompt_length} tokens, all completions "
        f"{args.max_completion_length}.",
        "",
        *aligned(rows),
        "",
        f"Time, predicted and not measured: {step:,.1f} s per step, {duration(run)} for "
        f"{args.num_train_iters:,} steps and {evaluations} "
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
            verdict = f"does not fit; with all the flags that save memory {total / GB:.1f} GB"
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
    """One before, one after, and those in between."""
    if args.num_train_iters == 0:
        return 1
    every = args.eval_iterations or args.num_train_iters
    return 1 + math.ceil(args.num_train_iters / every)


def duration(seconds):
    return f"{seconds / 3600:,.1f} h" if seconds > 5400 else f"{seconds / 60:,.0f} min"


# --- one step ----------------------------------------------------------------------------------


def step_plan(policy, args, on_gpu=False, machine=None):
    """The Plan, from one step of this policy, whose tensors may be real or fake.

    The order is that of the loop from its second step on: Adam's moments are there throughout.
    """
    add_adapter(policy, args, on_gpu)
    trained = trained_parameters(policy)
    if args.gradient_checkpointing:
        policy.activation_checkpointing_enable()
        policy.train()
    tracker = Tracker(machine, policy.config.vocab_size)
    autocast = torch.autocast("cpu", torch.bfloat16) if on_gpu else nullcontext()
    work, tokens = {}, {}
    with tracker:
        tracker.label(policy.parameters(), "weights")
        with tracker.part("reference"):
            reference = kl_reference(policy, args, on_gpu)
        optimizer, _ = make_optimizer(policy, args)
        with tracker.part("Adam"):
            fill_moments(optimizer)
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(
                lambda parameter: tracker.label([parameter.grad], "gradients")
            )

        with tracker.phase("sampling"), autocast:
            at_once = args.sampling_batch_size // args.group_size or args.questions_per_step
            at_once = min(at_once, args.questions_per_step)
            work["sampling"], tokens["sampling"] = sample(
                policy, at_once, args.group_size, args.temperature, args, tracker, on_gpu
            )
        batches = args.questions_per_step / at_once * args.max_draws
        work["sampling"] *= batches
        tokens["sampling"] = round(tokens["sampling"] * batches)
        step = Step(policy, args, autocast)
        if reference is not None:
            largest, tokens["reference"], passes = step.cut(WITHOUT_GRADIENT)
            with tracker.phase("reference"), torch.no_grad():
                before = tracker.work
                for batch in largest:
                    step.logprobs(reference, batch)
            work["reference"] = (tracker.work - before) * passes
        largest, read, passes = step.cut(1)
        with tracker.phase("policy"):
            before = tracker.work
            for batch in largest:
                step.backward(batch, with_reference=reference is not None)
        work["policy"] = (tracker.work - before) * (passes * args.num_inner_epochs)
        tokens["policy"] = read * args.num_inner_epochs
        with tracker.phase("optimizer"):
            before = tracker.work
            torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm or math.inf)
            optimizer.step()
            optimizer.zero_grad()
        work["optimizer"] = (tracker.work - before) * args.num_inner_epochs
        del step
        with tracker.phase("evaluation"), autocast:
            problems = args.eval_problems or GSM8K_TEST
            rows = max(min(args.eval_batch_size, problems), args.eval_samples)
            answers = problems * (1 + args.eval_samples)
            work["evaluation"], tokens["evaluation"] = sample(
                policy, rows, 1, 0, args, tracker, on_gpu
            )
        work["evaluation"] *= math.ceil(answers / rows)
        tokens["evaluation"] = tokens["evaluation"] // rows * answers
    counts = [sum(p.numel() for p in ps) for ps in (policy.parameters(), trained)]
    return Plan(args, *counts, tracker.phases, work, tokens)


def fill_moments(optimizer):
    """Have Adam make its moments, as its first step does."""
    for parameter in parameters_of(optimizer):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def worst_prompts(questions, args):
    """Q prompts of the greatest length, as lists of ids, that have but their first tokens in common
    (a chat template begins all prompts alike)."""
    rest = [0] * max(0, args.max_prompt_length - 2)
    prompts = ([0, question % 2, *rest] for question in range(questions))
    return [prompt[: args.max_prompt_length] for prompt in prompts]


@torch.no_grad()
def sample(policy, questions, group_size, temperature, args, tracker, on_gpu):
    """What sampler.sample_rollouts does, its loop cut short to two tokens: the last, for memory,
    and one half-way. Their work gives that of a token on average, which goes by how much of the
    cache is read. Returns work and tokens of all; to record CUDA graphs is left out of both."""
    rows, length = questions * group_size, args.max_completion_length
    before = tracker.work
    with tracker.part("sampling copy"):
        if on_gpu and recorder_for(policy, "cuda"):
            decoder = GraphDecoder(policy, group_size, length, partial(PlannedGraph, tracker))
        else:
            decoder = Decoder(policy, group_size, length)
    uniforms = torch.zeros((length, rows), dtype=torch.float64)
    logits = decoder.prefill(worst_prompts(questions, args))  # (R, V)
    caches = (decoder.prompt_keys, decoder.prompt_values, decoder.keys, decoder.values)
    tracker.label([tensor for part in caches for tensor in part], "KV cache")
    prompts = tracker.work - before
    of_a_token = {}  # by how much of the cache is read
    for place in (length - 1, length // 2):
        before = tracker.work
        decoder.written = place
        read = decoder.length_to_read()
        tokens, _ = sample_tokens(
            logits, uniforms[place], temperature, args.top_k, args.top_p, args.min_p
        )
        logits = decoder.step(tokens)
        of_a_token[read] = tracker.work - before
    return (
        prompts + at_length(of_a_token, average_read(decoder, length)) * length,
        questions * args.max_prompt_length + rows * length,
    )


def average_read(decoder, length):
    """Tokens of the completions' cache that a step reads."""
    total = 0
    for decoder.written in range(length):
        total += decoder.length_to_read()
    return total / length


def at_length(works, length):
    """Work there, on the line through those of {length: work}, one or two."""
    (low, less), (high, more) = min(works.items()), max(works.items())
    return less + (more - less) * ((length - low) / max(high - low, 1))


class PlannedGraph:
    """In place of a CUDA graph, what it would do."""

    def __init__(self, tracker, function):
        self.tracker = tracker
        self.function = WeakMethod(function)  # of the decoder, which refers to this

    def replay(self):
        with self.tracker.graph():
            return self.function()()


def tokens_read(batch):
    """A completion's last token is never read."""
    return sum(map(len, batch.prompts)) + sum(batch.lengths) - len(batch.lengths)


class Step:
    """The update's forward and backward passes, as in main.update_policy, over completions that are
    all of the greatest length."""

    def __init__(self, policy, args, autocast):
        self.policy, self.args, self.autocast = policy, args, autocast
        length, trained = args.max_completion_length, args.train_group_size or args.group_size
        rows = args.questions_per_step * args.group_size
        self.prompts = [torch.tensor(ids) for ids in worst_prompts(args.questions_per_step, args)]
        group = [length] * trained + [0] * (args.group_size - trained)
        self.lengths = [group] * args.questions_per_step
        self.ids = torch.zeros((rows, length), dtype=torch.long)
        self.old_logprobs, self.weights = torch.zeros(rows, length), torch.ones(rows, length)
        self.advantages = torch.ones(rows)

    def cut(self, factor):
        """The step in passes of `factor` budgets each: (those that need most memory, the tokens of
        all that the model reads, how many times those of the former this is)."""
        batches = micro_batches(self.prompts, self.lengths, factor * self.args.micro_batch_tokens)
        # Only the first finds no gradients from passes before it.
        largest = [batches[0], *sorted(batches[1:], key=tokens_read)[-1:]]
        read = sum(map(tokens_read, batches))
        return largest, read, read / sum(map(tokens_read, largest))

    def logprobs(self, model, batch, **more):
        ids, temperature = self.ids[batch.rows], self.args.temperature
        with self.autocast:
            return completion_logprobs(model, batch, ids, temperature, **more)

    def backward(self, batch, with_reference):
        args, rows, entropy = self.args, batch.rows, None
        if args.entropy_bonus > 0:
            logprobs, entropy = self.logprobs(self.policy, batch, with_entropy=True)
        else:
            logprobs = self.logprobs(self.policy, batch)
        loss, _ = grpo_loss(
            logprobs,
            self.old_logprobs[rows],
            self.old_logprobs[rows] if with_reference else None,
            self.advantages[rows],
            self.weights[rows],
            args.clip_epsilon,
            args.clip_epsilon_high,
            args.kl_beta,
            args.kl_estimator,
            args.ratio,
            args.clip,
            args.tis_cap,
            logprobs.detach(),
            args.entropy_bonus,
            entropy,
        )
        loss.backward()
