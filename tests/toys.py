"""Tiny models, stand-in tokenizers and naive references that several test files share."""

import itertools
import json
from dataclasses import replace

import torch
from conftest import make_args, make_model, make_setup, make_tokenizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from launch.parser import parse_args
from records.checkpoints import Saver
from sampling.engine import start_engine
from sampling.groups import sample_rollouts
from training.logprobs import completion_logprobs
from training.optimizer import make_optimizer
from training.shared_prefix import micro_batches
from training.update import update_policy
from utils import write_jsonl

PROMPT = torch.tensor([5, 17, 2, 88, 41, 7])


COMPLETIONS = torch.tensor([[3, 9, 27, 81, 11], [4, 16, 64, 25, 1], [99, 98, 97, 0, 0]])


def naive_logprobs(model, prompt, completions, temperature):
    """One sequence, one position, one token at a time, from full forward passes."""
    rows = []
    for completion in completions:
        sequence = torch.cat([prompt, completion])
        logits = model(sequence[None]).logits[0]
        row = []
        for offset, token in enumerate(completion):
            scaled = logits[len(prompt) + offset - 1] / temperature
            scaled = scaled - scaled.max()
            row.append(scaled[token] - torch.log(torch.exp(scaled).sum()))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def group_logprobs(model, prompt, completion_ids, temperature):
    """`completion_logprobs` for one whole group, in its own order."""
    rows, length = completion_ids.shape
    [batch] = micro_batches([prompt], [[length] * rows], 0)
    logprobs, _ = completion_logprobs(model, batch, completion_ids[batch.rows], temperature)
    return logprobs[batch.rows.argsort()]


class Words:
    """A stand-in tokenizer for a tiny vocabulary: `stop` ends a completion and is also padding."""

    def __init__(self, stop):
        self.eos_token_id = self.pad_token_id = stop

    def batch_decode(self, rows, skip_special_tokens):
        return [" ".join(str(i) for i in row if i != self.eos_token_id) for row in rows]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def seeds(start=0):
    """As many seeds as there are prompts."""
    return itertools.count(1000 * start)


def naive(model, rollouts, question, temperature):
    with torch.no_grad():
        prompt, ids = rollouts.prompt_ids[question], rollouts.completion_ids[question]
        return naive_logprobs(model, prompt, ids, temperature)


def assert_stops_end_completions(rollouts, length_limit):
    """Tokens 0 and 1 stop, 0 pads: masks end with the first of either, and both occur."""
    endings = set()
    ids, mask, finished = (
        x.flatten(0, 1).tolist()
        for x in (rollouts.completion_ids, rollouts.completion_mask, rollouts.finished)
    )
    for row, kept, ended in zip(ids, mask, finished):
        stops = [t for t, token in enumerate(row) if token in (0, 1) and kept[t]]
        length = sum(kept)
        assert kept == [True] * length + [False] * (len(row) - length)
        assert ended == (len(stops) == 1)
        assert length == (stops[0] + 1 if stops else length_limit)
        assert all(token == 0 for token in row[length:])
        endings.update(row[t] for t in stops)
    assert endings == {0, 1}
    assert not all(finished)


def tensors_in(*values):
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


def of_host(*values):
    return all(hasattr(x, "of_host") for x in tensors_in(*values))


class HostTensors(TorchFunctionMode):
    """On the CPU, tells the tensors that stand for the GPU's from those that are the host's.

    The host's are made with device="cpu", copied by `.cpu()`, or computed from such alone. Notes
    what copies between the two, and would wait: `.cpu()`, `.tolist()`, torch.tensor(..., device).
    """

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs, name = tensors_in(args, kwargs), func.__name__
        if name in ("cpu", "tolist", "numpy") and not of_host(inputs):
            self.waits.append(name)
        if func is torch.tensor and kwargs.get("device") != "cpu":
            self.waits.append("torch.tensor")
        if name == "cpu" or (name == "to" and of_host(inputs)):  # to_device: from pinned memory
            result = args[0].clone()
        else:
            result = func(*args, **kwargs)
        made = not inputs and kwargs.get("device") == "cpu"
        if name != "to" and (name == "cpu" or made or (inputs and of_host(inputs))):
            for tensor in tensors_in(result):
                tensor.of_host = True
        return result


WAITING = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "nonzero_numpy", "masked_select"}


WAITING |= {"isin", "_unique", "_unique2", "unique_consecutive"}


class Waits(TorchDispatchMode):
    """Notes the operations on the GPU's tensors whose result the host needs before it can go on."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masked = name in ("index", "index_put", "index_put_") and any(
            index.dtype == torch.bool for index in tensors_in(args[1])
        )
        positions = name == "where" and len(args) == 1
        if (name in WAITING or masked or positions) and not of_host(args, kwargs):
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


ADVANTAGES = torch.tensor([[1.0, -1.0, 0.5, -0.5], [0.0, 0.0, 0.0, 0.0], [2.0, -1.0, -1.0, 0.0]])


def rollouts_from(model, temperature=1.0, seed=0, length=10):
    return sample_rollouts(
        model, Words(0), [[5, 9, 3], [8, 8], [7, 7, 1, 3]], 4, length, temperature, seeds(seed)
    )


def toy(dtype=torch.float64, **overrides):
    return make_model(dtype=dtype, vocab_size=14, **overrides)


class RecordingSGD(torch.optim.SGD):
    """Plain gradient descent at rate 0 that keeps the gradients it was given."""

    def __init__(self, model):
        super().__init__(model.parameters(), lr=0.0)

    def step(self, closure=None):
        self.seen = [
            torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for group in self.param_groups
            for p in group["params"]
        ]


def gradients(
    model, rollouts, accelerator, advantages=ADVANTAGES, reference=None, chosen=None, **flags
):
    """(what an update gives the optimizer, its metrics)."""
    optimizer = RecordingSGD(model)
    args = make_args(max_completion_length=10, **flags)
    setup = make_setup(model, args, accelerator, reference=reference)
    metrics = update_policy(setup, optimizer, rollouts, advantages, chosen)
    return optimizer.seen, metrics


def distance(ours, theirs):
    """The largest relative difference among the parameters' gradients."""
    return max((a - b).norm() / b.norm().clamp(min=1e-12) for a, b in zip(ours, theirs)).item()


def written(answer="72", reasoning="48 / 2 = 24"):
    return f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}\n</answer>\n"


def random_step(seed, questions=3, group_size=4, length=7):
    """Log-probs, rewards and a mask of unequal lengths, in fp64; one completion is empty."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shape = (questions, group_size, length)
    logprobs = -random(*shape).abs()
    old = logprobs + 0.3 * random(*shape)
    reference = logprobs + 0.3 * random(*shape)
    lengths = torch.randint(0, length + 1, shape[:2], generator=generator)
    lengths[0, 0] = 0
    mask = torch.arange(length) < lengths[..., None]
    return logprobs, old, reference, random(*shape[:2]), mask


def answers(both, only_first, only_second, neither):
    """Two lists of verdicts on the same questions."""
    first = [True] * (both + only_first) + [False] * (only_second + neither)
    second = [True] * both + [False] * only_first + [True] * only_second + [False] * neither
    return first, second


def record(question, correct, completion="a text", **more):
    return {"question": question, "answer": "7", "completion": completion, "correct": correct,
            "lenient_correct": correct, "format": True, "length": 5, "finished": True,
            **more}  # fmt: skip


def write_run(folder, evaluations, **flags):
    """A run's directory with these evaluations, {step: records}."""
    (folder / "completions").mkdir(parents=True)
    for step, records in evaluations.items():
        write_jsonl(folder / "completions" / f"eval_{step:05d}.jsonl", records)
    (folder / "config.json").write_text(json.dumps({"flags": flags}))
    return str(folder)


def flags_of(saved_models, path, *more):
    """The flags of a toy run in `path`, whose data are beside it."""
    data = path.parent / "data.jsonl"
    rows = [{"question": f"{n}?", "answer": str(n), "solution": str(n)} for n in range(60)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (
        "--preset", "cpu", "--model_name", saved_models["qwen2"], "--dataset_path", data,
        "--output_dir", path, "--questions_per_step", 6, "--group_size", 3, "--num_train_iters", 3,
        "--max_completion_length", 6, "--cold_start_steps", 1, "--eval_problems", 5,
        "--learning_rate", 1e-3, "--kl_beta", 0.1, "--save_steps", 2, "--keep_checkpoints", 9,
        "--precision", "fp32", *more,
    )  # fmt: skip


def saver_of(path, model=None, reference=None, start=None, **overrides):
    args = make_args(
        output_dir=str(path), cold_start_steps=0, keep_checkpoints=2, seed=1, **overrides
    )
    model = make_model() if model is None else model
    optimizer, _ = make_optimizer(model, args)
    setup = make_setup(model, args, tokenizer=make_tokenizer(), reference=reference)
    return Saver(setup, optimizer, {"n": 1}, start)


def without_layers(**more):
    plain = {"vocab_size": 40, "num_hidden_layers": 0, "tie_word_embeddings": False}
    return make_model("llama", **{**plain, **more})


def asked_of(engine, monkeypatch):
    """What is asked of an engine of --sampler vllm from now on, a list that grows."""
    asked, ask = [], engine.ask

    def noted(what, *more, **arguments):
        asked.append(what)
        return ask(what, *more, **arguments)

    monkeypatch.setattr(engine, "ask", noted)
    return asked


def engine_setup(model, accelerator, python, describe=lambda folder: None, **flags):
    """A Setup of --sampler vllm, whose engine this Python has started. describe: see
    start_engine."""
    args = make_args(
        sampler="vllm", vllm_python=python, vllm_devices=None,
        **{"precision": "fp32", "vllm_arguments": {}, "vllm_transfer": "file", **flags},
    )  # fmt: skip
    setup = make_setup(model, args, accelerator, Words(0))
    return replace(setup, engine=start_engine(model, args, accelerator, describe))


def resuming(path, resume="latest", **overrides):
    return make_args(
        output_dir=str(path), cold_start_steps=0, keep_checkpoints=2, seed=1, resume=resume,
        **overrides,
    )  # fmt: skip


def move(saver):
    """A completed step of one update with made-up gradients."""
    for parameter in saver.policy.parameters():
        parameter.grad = torch.ones_like(parameter)
    saver.optimizer.step()
    saver.completed(saver.done + 1)


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))


PARAMETERS = {  # as the models' cards and torchinfo count them
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "smollm2-135m": 134_515_008,
}


SMALL = [
    "--questions_per_step", "4", "--group_size", "6", "--max_prompt_length", "33",
    "--max_completion_length", "12", "--micro_batch_tokens", "180", "--eval_batch_size", "24",
    "--kl_beta", "0",
]  # fmt: skip


def planning(*argv, preset="cpu"):
    """The flags of a plan."""
    return parse_args(["--plan", "--preset", preset, *argv])
