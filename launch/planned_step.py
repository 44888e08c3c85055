"""One step of a run on fake tensors, which have shapes but no memory (see fake_memory.py).

It is carried out by the functions that train: nothing of the model's arithmetic is repeated here.
The plan is of the worst case: every prompt as long as --max_prompt_length, every completion as long
as --max_completion_length, and of the prompts' beginnings one token in common.

Q questions per step, G completions per question, P prompt tokens, C completion tokens.
"""

import logging
import math
import warnings
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from unittest import mock
from weakref import WeakMethod

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

from grpo import Batch, grpo_loss
from launch.fake_memory import Tracker
from launch.known_models import KNOWN_MODELS
from llms import kl_reference, refuse_family, refusing
from sampling.cuda_graph import GraphDecoder, recorder_for
from sampling.decoder import Decoder
from sampling.fallback import OwnLayers, falls_back
from sampling.groups import sample_tokens
from training.lean_layers import recompute_layers
from training.logprobs import completion_logprobs
from training.lora import add_adapter, trained_parameters
from training.optimizer import clip_gradients, make_optimizer
from training.shared_prefix import WITHOUT_GRADIENT, micro_batches
from training.update import objective_of
from utils import base_and_adapters, hub_token, parameters_of

GSM8K_TEST = 1319  # problems in its official test split


@dataclass(frozen=True)
class Plan:
    """What a run with these flags would take."""

    args: object
    parameters: int
    trained: int  # of these
    phases: dict  # phase: {part: bytes} at that phase's peak
    work: dict  # phase: Work of one step, for `evaluation` that of one evaluation
    tokens: dict  # phase: tokens that go through the model
    falls_back: bool = False  # whether the model's own layers sample

    @property
    def peaks(self):
        return {phase: sum(parts.values()) for phase, parts in self.phases.items()}

    @property
    def peak(self):
        return max(self.peaks.values())


def planned(args, on_gpu, machine=None, layers=None):
    """The Plan of a run with these flags, from one step on fake tensors.

    machine: for the work, else there is none. layers: of the model, if not as many as it has.
    """
    with as_if(on_gpu):
        with refusing(
            f"--model_name {args.model_name}: cannot be planned, its config.json is damaged"
        ):
            config = config_of(args.model_name)
            refuse_family(config, f"--model_name {args.model_name}")
            config.num_hidden_layers = layers or config.num_hidden_layers
            # Some kinds read positions, which fake tensors do not have; of all, the shapes agree.
            ropes = ropes_of(config)
            kinds = [rope["rope_type"] for rope in ropes]
            for rope in ropes:
                rope["rope_type"] = "default"
            policy = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            for rope, kind in zip(ropes_of(policy.config), kinds):  # for recorder_for
                rope["rope_type"] = kind
            for buffer in policy.buffers():  # without numbers, which small ones have and that
                buffer.constant = None  # cannot be copied
        if not falls_back(policy):
            return step_plan(policy.eval(), args, on_gpu, machine)
        kind = f"--model_name {args.model_name}: model type {config.model_type}"
        with refusing(f"{kind}: its layers cannot be planned"):  # some read numbers
            return step_plan(policy.eval(), args, on_gpu, machine)


def config_of(model_name):
    """A model's configuration: known, or from its directory, or as launch/checks.py fetched it."""
    base, _ = base_and_adapters(model_name)
    if base in KNOWN_MODELS:
        return AutoConfig.for_model(**KNOWN_MODELS[base])
    return AutoConfig.from_pretrained(base, token=hub_token())


def ropes_of(config):
    """The model's kinds of rotary embeddings: one, one for each kind of layers, or none."""
    ropes = getattr(config, "rope_parameters", None) or {}
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


def step_plan(policy, args, on_gpu=False, machine=None):
    """The Plan, from one step of this policy, whose tensors may be real or fake.

    The order is that of the loop from its second step on: Adam's moments are there throughout.
    """
    add_adapter(policy, args, on_gpu)
    trained = trained_parameters(policy)
    if args.gradient_checkpointing:
        recompute_layers(policy)
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
                step.backward(batch)
        work["policy"] = (tracker.work - before) * (passes * args.num_inner_epochs)
        tokens["policy"] = read * args.num_inner_epochs
        with tracker.phase("optimizer"):
            before = tracker.work
            clip_gradients(trained, args.max_grad_norm)
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
    return Plan(args, *counts, tracker.phases, work, tokens, falls_back(policy))


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
    """What sample_rollouts does, its loop cut short to two tokens: the last, for memory,
    and one half-way. Their work gives that of a token on average, which goes by how much of the
    cache is read. Returns work and tokens of all; to record CUDA graphs is left out of both."""
    rows, length = questions * group_size, args.max_completion_length
    before = tracker.work
    with tracker.part("sampling copy"):
        if falls_back(policy):
            decoder = OwnLayers(policy, group_size, length, shares=False)
        elif on_gpu and recorder_for(policy, "cuda"):
            decoder = GraphDecoder(policy, group_size, length, partial(PlannedGraph, tracker))
        else:
            decoder = Decoder(policy, group_size, length, shares=False)
    uniforms = torch.zeros((length, rows), dtype=torch.float64)
    logits, row = decoder.prefill(worst_prompts(questions, args))  # (R, V), (R,)
    if not falls_back(policy):
        caches = (decoder.prompt_keys, decoder.prompt_values, decoder.keys, decoder.values)
        tracker.label([tensor for part in caches for tensor in part], "KV cache")
    prompts = tracker.work - before
    of_a_token = {}  # by how much of the cache is read
    for place in (length - 1, length // 2):
        before = tracker.work
        decoder.written = place
        if falls_back(policy):
            tracker.label(filled(decoder, args.max_prompt_length + place), "KV cache")
        read = decoder.length_to_read()
        tokens, _ = sample_tokens(
            logits, uniforms[place], temperature, args.top_k, args.top_p, args.min_p, row
        )
        logits = decoder.step(tokens)
        of_a_token[read] = tracker.work - before
    return (
        prompts + at_length(of_a_token, average_read(decoder, length)) * length,
        questions * args.max_prompt_length + rows * length,
    )


def filled(decoder, length):
    """The cache of OwnLayers, filled up to `length` tokens per row, or as many as layers keep."""
    decoder.mask = decoder.mask.new_ones((len(decoder.mask), length))
    tensors = []
    for layer in decoder.cache.layers:
        kept = length
        if layer.is_sliding:
            layer.cumulative_length, kept = length, min(length, layer.sliding_window - 1)
        for name in ("keys", "values"):
            rows, heads, _, size = getattr(layer, name).shape
            tensors.append(getattr(layer, name).new_zeros((rows, heads, kept, size)))
            setattr(layer, name, tensors[-1])
    return tensors


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
    """The update's forward and backward passes, as in training/update.py, over completions that are
    all of the greatest length."""

    def __init__(self, policy, args, autocast):
        self.policy, self.args, self.autocast = policy, args, autocast
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
        # Only the first finds no gradients from passes before it.
        largest = [batches[0], *sorted(batches[1:], key=tokens_read)[-1:]]
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
        loss.backward()
