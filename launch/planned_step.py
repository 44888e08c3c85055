"""One step of a run on fake tensors, which have shapes but no memory (see fake_memory.py).

It is carried out by the functions that train: nothing of the model's arithmetic is repeated here.
The plan is of the worst case: every prompt as long as --max_prompt_length, every completion as long
as --max_completion_length, and of the prompts' beginnings one token in common.

It is carried out with two layers and with three, which tell what it takes with all, see `extended`.

Q questions per step, G completions per question, P prompt tokens, C completion tokens.
"""

import logging
import math
import warnings
from collections import Counter
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig

from grpo import Batch, grpo_loss
from launch.fake_memory import Tracker
from launch.known_models import KNOWN_MODELS
from launch.planned_sampling import sample, worst_prompts
from llms import kl_reference, refuse_family, refusing
from sampling.fallback import falls_back, is_written_out
from training import lean_layers
from training.lean_layers import checkpointed, recompute_layers
from training.logprobs import completion_logprobs
from training.lora import add_adapter, freeze_tower, trained_parameters
from training.optimizer import clip_gradients, make_optimizer
from training.precision import DTYPES, resolved
from training.progress import progress
from training.shared_prefix import WITHOUT_GRADIENT, micro_batches
from training.update import objective_of
from utils import base_and_adapters, hub_token, parameters_of
from vision.sight import class_of, sees

GSM8K_TEST = 1319  # problems in its official test split
PHASES = ("sampling", "reference", "policy", "optimizer", "evaluation")
# Numbers of layers that are carried out. The least: a single layer is the first and the last.
FEW, MORE = 2, 3


@dataclass(frozen=True)
class Plan:
    """What a run with these flags would take."""

    args: object
    parameters: int
    trained: int  # of these
    stretches: dict  # phase: [{part: bytes} at a stretch's peak], see fake_memory.Tracker
    work: dict  # phase: Work of one step, for `evaluation` that of one evaluation
    tokens: dict  # phase: tokens that go through the model
    falls_back: bool = False  # whether the model's own layers sample

    @property
    def phases(self):
        """{phase: {part: bytes} at that phase's peak}."""
        return {phase: max(peaks, key=Counter.total) for phase, peaks in self.stretches.items()}

    @property
    def peaks(self):
        return {phase: sum(parts.values()) for phase, parts in self.phases.items()}

    @property
    def peak(self):
        return max(self.peaks.values())


def planned(args, on_gpu, machine=None, layers=None, phases=PHASES):
    """The Plan of a run with these flags, from one step on fake tensors.

    machine: for the work, else there is none. layers: of the model, if not as many as it has.
    phases: those to plan; the optimizer's comes with the policy's.
    """
    with damaged(args):
        config = config_of(args.model_name)
        refuse_family(config, f"--model_name {args.model_name}")
        layers = layers or config.get_text_config().num_hidden_layers
    if layers <= MORE or not is_written_out(config):  # others have layers of several kinds
        return planned_in_full(args, on_gpu, machine, layers, phases)
    few, more = (planned_in_full(args, on_gpu, machine, depth, phases) for depth in (FEW, MORE))
    return extended(few, more, layers - FEW)


def damaged(args):
    """What a model's configuration raises becomes a UserError."""
    name = f"--model_name {args.model_name}"
    return refusing(f"{name}: cannot be planned, its config.json is damaged")


def extended(few, more, times):
    """The Plan with `times` layers more than `few` has, from it and from `more`, with one more.

    Layers are alike, so that each adds the same to the work, and to what is alive at any moment
    before or after them. From layer to layer what is alive grows or falls by the same: forward by
    what one keeps, backward by its gradients less what it kept. So the peak of a stretch is in the
    first layer or in the last, in the same of the two whatever their number, on which it depends in
    a straight line. That of a phase does not: with more layers another of its stretches may be the
    one that takes most.
    """

    def on_line(low, high):
        return low + (high - low) * times

    def peak_on_line(low, high):
        return Counter({part: on_line(low[part], high[part]) for part in {*low, *high}})

    return Plan(
        few.args,
        on_line(few.parameters, more.parameters),
        on_line(few.trained, more.trained),
        {
            phase: [peak_on_line(*pair) for pair in zip(peaks, more.stretches[phase], strict=True)]
            for phase, peaks in few.stretches.items()
        },
        {phase: on_line(work, more.work[phase]) for phase, work in few.work.items()},
        few.tokens,
    )


def planned_in_full(args, on_gpu, machine, layers, phases=PHASES):
    """The Plan of a model with so many layers, all of which are carried out."""
    with as_if(on_gpu):
        with damaged(args):
            config = config_of(args.model_name)
            config.get_text_config().num_hidden_layers = layers
            # Some kinds read positions, which fake tensors do not have; of all, the shapes agree.
            ropes = ropes_of(config)
            kinds = [rope["rope_type"] for rope in ropes]
            for rope in ropes:
                rope["rope_type"] = "default"
            policy = class_of(config)._from_config(config, dtype=torch.float32)
            if sees(config):
                freeze_tower(policy)
            for rope, kind in zip(ropes_of(policy.config), kinds):  # for recorder_for
                rope["rope_type"] = kind
            for buffer in policy.buffers():  # without numbers, which small ones have and that
                buffer.constant = None  # cannot be copied
        progress.tick(1, "steps")
        if not falls_back(policy):
            return step_plan(policy.eval(), args, on_gpu, machine, phases)
        kind = f"--model_name {args.model_name}: model type {config.model_type}"
        with refusing(f"{kind}: its layers cannot be planned"):  # some read numbers
            return step_plan(policy.eval(), args, on_gpu, machine, phases)


def config_of(model_name):
    """A model's configuration: known, or from its directory, or as launch/checks.py fetched it."""
    base, _ = base_and_adapters(model_name)
    if base in KNOWN_MODELS:
        return AutoConfig.for_model(**KNOWN_MODELS[base])
    return AutoConfig.from_pretrained(base, token=hub_token())


def ropes_of(config):
    """The model's kinds of rotary embeddings: one, one for each kind of layers, or none."""
    ropes = getattr(config.get_text_config(), "rope_parameters", None) or {}
    ropes = [ropes] if "rope_type" in ropes else ropes.values()
    return [rope for rope in ropes if isinstance(rope, dict)]


@contextmanager
def as_if(on_gpu):
    """Fake tensors, on the CPU whatever the plan is of: torch makes none on a GPU it does not have.

    The dtypes are those of CUDA, and so are the shapes. oneDNN, which cannot lay out a fake weight,
    is left out: its copy of a weight is as large as the plain one.
    """
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        log = logging.getLogger("torch._subclasses.fake_tensor")  # of what cannot be planned
        stack.enter_context(mock.patch.object(log, "disabled", True))
        stack.enter_context(mock.patch("torch.backends.mkldnn.is_available", lambda: False))
        stack.enter_context(mock.patch.object(torch.nn.Linear, "to", converted))
        if on_gpu:
            stack.enter_context(CudaAttention())
            # Fake weights are on the CPU.
            own = mock.patch.object(lean_layers, "_embedding", lean_layers.own_forward)
            stack.enter_context(own)
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


def step_plan(policy, args, on_gpu=False, machine=None, phases=PHASES):
    """The Plan, from one step of this policy, whose tensors may be real or fake.

    The order is that of the loop from its second step on: Adam's moments are there throughout.
    """
    add_adapter(policy, args, on_gpu)
    trained = trained_parameters(policy)
    if args.gradient_checkpointing:
        recompute_layers(policy)
    tracker = Tracker(machine, policy.config.get_text_config().vocab_size)
    dtype = DTYPES[resolved(args.precision, on_gpu)]
    autocast = torch.autocast("cpu", dtype) if dtype else nullcontext()
    work, tokens = {}, {}
    with tracker:
        tracker.label(policy.parameters(), "weights", of_layers=False)
        for layer in checkpointed(policy):
            tracker.label(layer.parameters(), "weights", of_layers=True)
        with tracker.part("reference"):
            reference = kl_reference(policy, args, on_gpu)
        optimizer, _ = make_optimizer(policy, args)
        with tracker.part("Adam"):
            fill_moments(optimizer)
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(
                lambda parameter: tracker.label([parameter.grad], "gradients")
            )

        if "sampling" in phases:
            at_once = args.sampling_batch_size // args.group_size or args.questions_per_step
            at_once = min(at_once, args.questions_per_step)
            with tracker.phase("sampling"), autocast:
                work["sampling"], tokens["sampling"] = sample(
                    policy, at_once, args.group_size, args.temperature, args, tracker, on_gpu
                )
            batches = args.questions_per_step / at_once * args.max_draws
            work["sampling"] *= batches
            tokens["sampling"] = round(tokens["sampling"] * batches)
        step = Step(policy, args, autocast, tracker)
        if "reference" in phases and reference is not None:
            largest, tokens["reference"], passes = step.cut(WITHOUT_GRADIENT)
            with tracker.phase("reference"), torch.no_grad():
                before = tracker.work
                for batch in largest:
                    step.logprobs(reference, batch)
            work["reference"] = (tracker.work - before) * passes
        if "policy" in phases:
            largest, read, passes = step.cut(1)
            looks = args.top_entropy < 1  # see update.on_most_uncertain
            with tracker.phase("policy"):
                before = tracker.work
                with torch.no_grad():
                    for batch in largest if looks else ():
                        step.logprobs(policy, batch, with_entropy=True)
                looked = tracker.work
                for batch in largest:
                    step.backward(batch)
            epochs = (tracker.work - looked) * args.num_inner_epochs
            work["policy"] = (looked - before + epochs) * passes
            tokens["policy"] = read * (args.num_inner_epochs + looks)
            with tracker.phase("optimizer"):
                before = tracker.work
                clip_gradients(trained, args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            work["optimizer"] = (tracker.work - before) * args.num_inner_epochs
        del step
        if "evaluation" in phases:
            problems = args.eval_problems or GSM8K_TEST
            rows = max(min(args.eval_batch_size, problems), args.eval_samples)
            answers = problems * (1 + args.eval_samples)
            with tracker.phase("evaluation"), autocast:
                work["evaluation"], tokens["evaluation"] = sample(
                    policy, rows, 1, 0, args, tracker, on_gpu
                )
            work["evaluation"] *= math.ceil(answers / rows)
            tokens["evaluation"] = tokens["evaluation"] // rows * answers
    counts = [sum(p.numel() for p in ps) for ps in (policy.parameters(), trained)]
    return Plan(args, *counts, tracker.stretches, work, tokens, falls_back(policy))


def fill_moments(optimizer):
    """Have Adam make its moments, as its first step does."""
    for parameter in parameters_of(optimizer):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def tokens_read(batch):
    """A completion's last token is never read."""
    return sum(map(len, batch.prompts)) + sum(batch.lengths) - len(batch.lengths)


class Step:
    """The update's forward and backward passes, as in training/update.py, over completions that are
    all of the greatest length."""

    def __init__(self, policy, args, autocast, tracker):
        self.policy, self.args, self.autocast, self.tracker = policy, args, autocast, tracker
        length, trained = args.max_completion_length, args.train_group_size or args.group_size
        rows = args.questions_per_step * args.group_size
        self.prompts = [torch.tensor(ids) for ids in worst_prompts(args.questions_per_step, args)]
        group = [length] * trained + [0] * (args.group_size - trained)
        self.lengths = [group] * args.questions_per_step
        self.ids = torch.zeros((rows, length), dtype=torch.long)
        logprobs = torch.zeros(rows, length)
        self.batch = Batch(
            sampled_logprobs=logprobs,
            advantages=torch.ones(rows),
            weights=torch.ones(rows, length),
            ref_logprobs=logprobs if args.kl_beta > 0 else None,
        )

    def cut(self, factor):
        """The step in passes of `factor` budgets each: (those that need most memory, the tokens of
        all that the model reads, how many times those of the former this is)."""
        batches = micro_batches(self.prompts, self.lengths, factor * self.args.micro_batch_tokens)
        # Only the first finds no gradients from passes before it; where there are none at all, what
        # is read counts alone.
        largest = [batches[0], *sorted(batches[1:], key=tokens_read)[-1:]]
        if factor == WITHOUT_GRADIENT and len({*map(tokens_read, largest)}) == 1:
            largest = largest[:1]
        read = sum(map(tokens_read, batches))
        return largest, read, read / sum(map(tokens_read, largest))

    def logprobs(self, model, batch, with_entropy=False):
        ids, temperature = self.ids[batch.rows], self.args.temperature
        with self.autocast:
            return completion_logprobs(model, batch, ids, temperature, with_entropy)

    def backward(self, batch):
        logprobs, entropy = self.logprobs(self.policy, batch, self.args.entropy_bonus > 0)
        seen = self.batch.rows(batch.rows)
        loss, _ = grpo_loss(logprobs, seen, objective_of(self.args), entropy)
        self.tracker.begin()  # autocast's copies of the layers' weights are gone
        loss.backward()
