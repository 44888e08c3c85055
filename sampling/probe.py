"""Does this model do here what it does in transformers? Asked of every model that is loaded.

Families differ in more ways than a list of names can hold: scaled embeddings and logits, norms in
other places, layers without positions, windows, experts. So a few tokens go through all three: the
model's own forward pass, the training pass and the sampler. Where the written-out decoder differs,
the model's own layers sample; where the training pass differs, the model is refused.

Windows, by which no short text is limited, are narrowed to WINDOW tokens for the time of it.
"""

import contextlib
import traceback

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from llms import load_model, refusing, rendering_of
from sampling.decoder import Decoder
from sampling.fallback import OwnLayers, falls_back
from training.logprobs import completion_logprobs
from training.shared_prefix import micro_batches, own_attention
from utils import UserError, hub_token

WINDOW = 4  # tokens
TOLERANCE = 1e-3  # nats per token; rounding in fp32 makes less than a tenth of it
LENGTHS = ((7, 3), (4, 2))  # (prompt, completion) tokens of the two sequences


def load_policy(args, accelerator):
    """(policy, tokenizer) as the flags name them, probed; says in a line where its own layers
    sample. Raises UserError where a flag asks for the decoder then, and as load_model and probe
    do."""
    flag = f"--model_name {args.model_name}"
    policy, tokenizer = load_model(
        args.model_name, accelerator.device, hub_token(), rendering_of(args)
    )
    probe(policy, flag)
    if falls_back(policy):
        kind = policy.config.model_type
        sampler = getattr(args, "sampler", "shared_prefix")  # not of all commands
        for asked, name in (
            (sampler not in ("shared_prefix", "vllm"), f"--sampler {sampler}"),
            (accelerator.is_fsdp2, "FSDP2"),  # it would gather every layer at every token
        ):
            if asked:
                raise UserError(f"{name}: not for model type {kind}, which its own layers sample "
                                "from; leave it out")  # fmt: skip
        tqdm.write(f"{flag}: model type {kind} is sampled from by its own layers, which is slower")
    return policy, tokenizer


def probe(model, flag):
    """Compare the three, in fp32, and set model.falls_back where the decoder differs.

    Returns the largest differences of (training, sampler), in nats per token. Raises UserError, for
    the model that `flag` names, where training or the model's own layers as a sampler differ from
    transformers' forward pass.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    prompts, completions = zip(*(
        torch.randint(vocabulary, (sum(lengths),), generator=generator)
        .to(model.device).split(lengths) for lengths in LENGTHS
    ))  # fmt: skip
    what = f"{flag}: model type {model.config.model_type}"
    with narrow_windows(model), exact_products():
        with refusing(f"{what}: fails in transformers itself, mend its files"):
            expected = own_logprobs(model, prompts, completions)  # (T,)
        try:
            training = trained_logprobs(model, prompts, completions)
        except UserError as error:
            raise UserError(f"{flag}: {error}") from None
        except Exception as error:  # of layers that are not called as those of most families
            raise UserError(f"{what}: {why_not_packed(error)}; not supported") from None
        differences = [difference(expected, training)]
        if not differences[0] <= TOLERANCE:
            raise UserError(f"{what}: the training pass is off by {differences[0]:.2g} nats per "
                            "token from transformers' forward pass; not supported")  # fmt: skip
        if not falls_back(model):
            differences.append(sampler_difference(Unjoined, model, prompts, completions, expected))
            model.falls_back = not differences[1] <= TOLERANCE
        if falls_back(model):
            off = sampler_difference(OwnLayers, model, prompts, completions, expected)
            differences[1:] = [off]
            if not off <= TOLERANCE:
                raise UserError(f"{what}: reading with a cache is off by {off:.2g} nats per token "
                                "from transformers' forward pass; not supported")  # fmt: skip
    return differences


def why_not_packed(error):
    """Why layers cannot read packed sequences, by where they failed."""
    # Our attention calls it where it was not told how the sequences are packed.
    if "sdpa_attention_forward" in {at.name for at in traceback.extract_tb(error.__traceback__)}:
        return "its layers do not hand on to attention how sequences are packed"
    return f"its layers cannot read packed sequences: {' '.join(str(error).split())[:80]}"


class Unjoined(Decoder):
    """Decoder on the weights where they are, for one that takes no memory for a copy."""

    @staticmethod
    def joined(linears, dtype):
        def product(x, plus=None):
            y = torch.cat([linear(x) for linear in linears], dim=-1)
            return y if plus is None else plus + y

        return product


@contextlib.contextmanager
def narrow_windows(model):
    """Inside, layers with a sliding window have one of WINDOW tokens."""
    held = [
        (holder, holder.sliding_window)
        for holder in (model.config.get_text_config(), *model.modules())
        if isinstance(getattr(holder, "sliding_window", None), int)
    ]
    try:
        for holder, _ in held:
            holder.sliding_window = WINDOW
        yield
    finally:
        for holder, window in held:
            holder.sliding_window = window


@contextlib.contextmanager
def exact_products():
    """Inside, fp32 is not rounded to TF32."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


@torch.no_grad()
def own_logprobs(model, prompts, completions):
    """log p of all completions' tokens, (T,), one sequence after the other, without a cache."""
    own_attention(model)
    values = []
    for prompt, completion in zip(prompts, completions):
        ids = torch.cat([prompt, completion])[None, :-1]
        logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 :]  # (C, V)
        values.append(of_tokens(logits, completion))
    return torch.cat(values)


@torch.no_grad()
def trained_logprobs(model, prompts, completions):
    """The same from the training pass, both sequences in one."""
    lengths = [len(completion) for completion in completions]
    [batch] = micro_batches(list(prompts), [[length] for length in lengths], 0)
    ids = torch.stack([F.pad(ids, (0, max(lengths) - len(ids))) for ids in completions])  # (2, C)
    logprobs, _ = completion_logprobs(model, batch, ids[batch.rows], 1.0)
    logprobs = logprobs[batch.rows.argsort()]
    return torch.cat([row[:length] for row, length in zip(logprobs, lengths)])


@torch.no_grad()
def sampled_logprobs(decoder, prompts, completions):
    """The same from a sampler that is handed the tokens one by one; one row ends first."""
    logits, _ = decoder.prefill([prompt.tolist() for prompt in prompts])
    rows, values = np.arange(len(prompts)), [[] for _ in prompts]
    for t in range(max(map(len, completions))):
        tokens = torch.stack([completions[row][t] for row in rows])
        for row, value in zip(rows, of_tokens(logits, tokens)):
            values[row].append(value)
        alive = np.flatnonzero([len(completions[row]) > t + 1 for row in rows])
        if not len(alive):
            break
        if len(alive) < len(rows):
            order = alive[decoder.branch(alive).argsort()]
            rows, tokens = rows[order], tokens[torch.from_numpy(order).to(tokens.device)]
        logits = decoder.step(tokens)
    return torch.cat([torch.stack(row) for row in values])


def of_tokens(logits, tokens):
    """log p of one token per line. logits: (N, V), tokens: (N,). Returns (N,)."""
    return logits.float().log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)


def sampler_difference(kind, model, prompts, completions, expected):
    """How far off a sampler of this kind is, in nats; infinite where it cannot run the model."""
    try:
        decoder = kind(model, 1, max(map(len, completions)), shares=False)
        return difference(expected, sampled_logprobs(decoder, prompts, completions))
    except Exception:  # whatever a model that is built otherwise does not have
        return float("inf")


def difference(expected, values):
    return (expected - values).abs().max().item()
