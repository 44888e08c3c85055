"""Policy, reference and tokenizer: loading, chat prompts, stop tokens.

What the policy makes of a completion, its log-probabilities, is in training/logprobs.py.
"""

import contextlib
import copy
from dataclasses import dataclass, field, replace
from datetime import date, datetime
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.utils import cached_file, chat_template_utils
from transformers.utils import logging as transformers_logging

from reading.embedded import embedded_folder
from training.lora import freeze_tower, has_adapter, settle_in_bfloat16, with_adapter
from training.precision import DTYPES, resolved
from training.sharding import is_sharded, whole_copy, whole_tensor
from utils import EMBEDDED_MODEL, EMBEDDED_SIGHTED, UserError, base_and_adapters
from vision.embedded import sighted_folder
from vision.sight import class_of, in_parts, load_sight, sees, sight_on

EMBEDDED = {EMBEDDED_MODEL: embedded_folder, EMBEDDED_SIGHTED: sighted_folder}
# As config.json's layer_types say: what a packed pass does, and what in it would mix sequences.
ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
MIXING_LAYERS = {
    "linear_attention", "conv", "hybrid", "hybrid_sliding", "compressed_sparse_attention",
    "heavily_compressed_attention",
}  # fmt: skip


@dataclass(frozen=True)
class Rendering:
    """How questions become prompts. It is the tokenizer's attribute `rendering`, so that training,
    evaluation and whoever else asks the model render alike."""

    date: str = "2026-01-01"  # what templates that write today's date take for it: no clock decides
    arguments: dict = field(default_factory=dict)  # of the chat template
    image_tokens: int = 256  # placeholders of an image, at most
    system_in_user: bool = False  # where the chat takes no system message
    opens_thinking: bool = False  # where a prompt ends in <think>


def rendering_of(args):
    """The Rendering that these flags ask for."""
    arguments = {"enable_thinking": args.enable_thinking, **args.chat_template_kwargs}
    return Rendering(args.prompt_date, arguments, args.image_tokens)


def rendering_on(tokenizer):
    return getattr(tokenizer, "rendering", Rendering())


def load_model(model_name, device, token=None, rendering=None):
    """Load policy and tokenizer: of one of EMBEDDED, a Hugging Face hub name, or a directory.

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
    flag, rendering = f"--model_name {model_name}", rendering or Rendering()
    base, adapters = base_and_adapters(model_name)
    with refusing(f"{flag}: cannot be loaded, fetch its files again"):
        base = EMBEDDED[base]() if base in EMBEDDED else base
        config = AutoConfig.from_pretrained(base, token=token)
        refuse_family(config, flag)
        tokenizer = load_tokenizer(base, token)
        model, report = class_of(config).from_pretrained(
            base, dtype=torch.float32, token=token, ignore_mismatched_sizes=True,
            output_loading_info=True,
        )  # fmt: skip
        misfits = [*report["missing_keys"], *report["unexpected_keys"]]
        misfits += [name for name, *_ in report["mismatched_keys"]]
        if misfits:  # transformers would fill them at random, or leave them out
            raise UserError(f"{flag}: weights and config.json disagree on {misfits[0]}; they "
                            "are of two models, or damaged")  # fmt: skip
        for folder in adapters:
            model = with_adapter(model, folder)
            tokenizer = tokenizer_with(folder, tokenizer)
        if adapters and torch.device(device).type == "cuda":
            settle_in_bfloat16(model)
        if sees(model.config):
            freeze_tower(model)
            tokenizer.sight = load_sight(base, tokenizer, model.config, rendering, token)
        settle_rendering(tokenizer, rendering, flag)
        stops = stop_token_ids(model, tokenizer)
    if not stops:
        raise UserError(f"{flag}: no token ends an answer; its tokenizer_config.json needs an "
                        "eos_token")  # fmt: skip
    known, tokens = model.get_input_embeddings().num_embeddings, len(tokenizer)
    if tokens > known and adapters:
        raise UserError(f"{flag}: its tokenizer has {tokens} tokens, the base model {known}; save "
                        "the adapter with their embeddings (save_embedding_layers)")  # fmt: skip
    if tokens > known:
        raise UserError(f"{flag}: its tokenizer has {tokens} tokens, the model {known}; use the "
                        "tokenizer that it was trained with")  # fmt: skip
    return model.to(device).eval(), tokenizer


def refuse_family(config, flag):
    """Raise UserError for what is no causal language model of transformers', for layers that hand
    something from token to token, by which the sequences of a packed pass would mix, and for
    attention that a packed pass does not do or cannot take the place of."""
    kind = class_of(config)
    what = f"{flag}: model type {config.model_type}"
    if kind is None:
        raise UserError(f"{what}: transformers has no causal language model of that type")
    layers = set(getattr(config.get_text_config(), "layer_types", None) or ()) - ATTENTION_LAYERS
    if layers & MIXING_LAYERS or kind._is_stateful:
        mixing = ", ".join(sorted(layers & MIXING_LAYERS)) or "with a state"
        raise UserError(f"{what}: its layers ({mixing}) would mix the sequences of a packed pass; "
                        "not supported")  # fmt: skip
    if layers:
        raise UserError(f"{what}: its layers ({', '.join(sorted(layers))}) see other tokens than "
                        "those of a packed pass do; not supported")  # fmt: skip
    if not kind._can_set_attn_implementation():
        raise UserError(f"{what}: its attention does not go through transformers' interface, by "
                        "which training packs sequences; not supported")  # fmt: skip


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


# What tokenizers split differently: lists, runs of blanks, digits, contractions, scripts, accents.
PROBE = (
    "Steps:\n\n1. 12,345 + 6.7\n\n\n2) It's \tCAN'T  3x\r\n   10% of $4,000?\n\n42 "
    "\u0661\u0662 \u00bd caf\u00e9 cafe\u0301 \ufb01 \u4f60\u597d123 snake_case HTTPServer2"
)


def load_tokenizer(name, token=None):
    """The tokenizer of a directory or of a hub name, as its tokenizer.json says, if it has one.

    transformers builds some classes that tokenizer_config.json may name (GPT2Tokenizer) from the
    vocabulary alone, without the file's own normalizer and pre-tokenizer.
    """
    tokenizer = AutoTokenizer.from_pretrained(name, token=token)
    file = cached_file(
        name, "tokenizer.json", token=token, _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    said = Tokenizer.from_file(file) if file else tokenizer.backend_tokenizer
    if _splits(tokenizer.backend_tokenizer) == _splits(said):
        return tokenizer
    # What the class names besides, an eos_token say, holds where the file has such a token.
    special = {
        role: token
        for role, token in tokenizer.special_tokens_map.items()
        if isinstance(token, str) and said.token_to_id(token) is not None
    }
    return PreTrainedTokenizerFast.from_pretrained(name, token=token, **special)


def tokenizer_with(folder, tokenizer):
    """What an adapter was trained with: the tokenizer and the chat template in its directory; where
    there is none, those of `tokenizer`, its base model's."""
    files = [Path(folder) / name for name in ("tokenizer.json", "tokenizer.model", "vocab.json")]
    template = Path(folder) / "chat_template.jinja"
    if any(file.is_file() for file in files):
        own = load_tokenizer(folder)
        own.chat_template = own.chat_template or tokenizer.chat_template
        return own
    if template.is_file():
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def _splits(core):
    """How a tokenizers.Tokenizer cuts text up."""
    states = [part.__getstate__() for part in (core.normalizer, core.pre_tokenizer, core.decoder)]
    return states, core.encode(PROBE, add_special_tokens=False).ids


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

    Its matrices are in what --precision computes in, unless it moves: bf16 would lose what little
    mixing changes. Of a policy with an adapter it is that adapter as it is now on the same weights,
    or, where nothing has been learnt before, these weights alone.
    """
    if args.kl_beta == 0:
        return None
    on_gpu = policy.device.type == "cuda" if on_gpu is None else on_gpu
    dtype = None if args.update_ref_model else DTYPES[resolved(args.precision, on_gpu)]
    reference = frozen_copy(policy, dtype)
    if has_adapter(policy) and args.cold_start_steps == 0:
        reference.disable_adapters()  # it adds 0: the result is the same and takes less
    return reference


@torch.no_grad()
def mix_into(reference, policy, alpha):
    """Move the reference towards the policy: reference = (1 - alpha) reference + alpha policy."""
    for old, new in zip(reference.parameters(), policy.parameters()):
        old.lerp_(whole_tensor(new), alpha)


# --- prompts and stops -------------------------------------------------------------------------

# For models without a chat template: what a text would go on from.
PLAIN_TEXT = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'Question: ' + message['content'] + '\n\n' }}"
    "{% else %}{{ 'Answer:\n' + message['content'] + eos_token + '\n\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Answer:\n' }}{% endif %}"
)


def settle_rendering(tokenizer, rendering, flag):
    """Set tokenizer.rendering, and a chat template where there is none. Says in a line what is not
    as in most chat models; raises UserError where a question does not arrive in the prompt."""
    if tokenizer.chat_template is None:
        # As its tokenizer begins any text, with a BOS or without.
        begins = tokenizer.bos_token and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
        tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + PLAIN_TEXT
        tqdm.write(
            f"{flag}: has no chat template; asked in plain text, where --stop may end an answer"
        )
    for name, value in rendering.arguments.items():
        if value is not False and name not in str(tokenizer.chat_template):
            tqdm.write(f"{flag}: its chat template does not know {name}, which does nothing")
    system, question = "Speak softly", "Which colour"
    tokenizer.rendering = rendering
    try:
        taken = system in tokenizer.decode(chat_prompt(tokenizer, system, question))
    except Exception:  # a template is a program, most say so by an error
        taken = False
    if not taken:
        tokenizer.rendering = replace(rendering, system_in_user=True)
    with refusing(f"{flag}: its chat takes no system message, nor a question alone"):
        prompt = tokenizer.decode(chat_prompt(tokenizer, system, question))
    if not (system in prompt and question in prompt):
        raise UserError(f"{flag}: its tokenizer or chat template loses the question; add the files "
                        "that are missing (tokenizer.json, chat_template.jinja)")  # fmt: skip
    opens_thinking = prompt.rstrip().endswith("<think>")
    tokenizer.rendering = replace(tokenizer.rendering, opens_thinking=opens_thinking)
    if not taken:
        tqdm.write(
            f"{flag}: its chat takes no system message; the system prompt begins the question"
        )


def prompt_of(tokenizer, task, problem):
    """The `chat_prompt` of a Problem of this Task."""
    return chat_prompt(tokenizer, task.system_prompt, problem.question, problem.images)


def chat_prompt(tokenizer, system_prompt, question, images=()):
    """Token ids of one question, ready for the assistant to answer, as a list of length P.

    The chat template alone writes special tokens, so a LLaMA prompt has one BOS, not two. images:
    what the question shows, of which the sizes count here (see vision/sight.py); raises UserError
    where the model sees none.
    """
    messages = [{"role": "user", "content": question}]
    if rendering_on(tokenizer).system_in_user:
        messages[0]["content"] = f"{system_prompt}\n\n{question}"
    else:
        messages.insert(0, {"role": "system", "content": system_prompt})
    sight = sight_on(tokenizer)
    if sight is None:
        if images:
            raise UserError(
                "--model_name: this model reads text alone, and the data has images; "
                "name one that sees, such as HuggingFaceTB/SmolVLM-256M-Instruct"
            )
        return rendered(tokenizer, messages, add_generation_prompt=True)
    messages[-1]["images"] = len(images)
    text = rendered(tokenizer, messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(sight.expanded(text, images), add_special_tokens=False).input_ids


def rendered(tokenizer, messages, **more):
    """A chat as its template writes it. more: arguments of tokenizer.apply_chat_template."""
    rendering = rendering_on(tokenizer)
    if sight_on(tokenizer):
        messages = [in_parts(**message) for message in messages]
    with _on_day(rendering.date):
        return tokenizer.apply_chat_template(
            messages, return_dict=False, **rendering.arguments, **more
        )


@contextlib.contextmanager
def _on_day(day):
    """Inside, chat templates that ask for today's date get this one.

    Their strftime_now reads the clock of transformers' module, and none can be handed to it: of
    what is passed to a template, functions become text.
    """

    class OnDay(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.combine(date.fromisoformat(day), datetime.min.time(), tz)

    clock = chat_template_utils.datetime
    chat_template_utils.datetime = OnDay
    try:
        yield
    finally:
        chat_template_utils.datetime = clock


def stop_token_ids(model, tokenizer):
    """Every token that ends a completion, sorted: the tokenizer's, the generation config's, and
    what the chat template writes after a turn of the assistant's.

    They differ for Qwen, whose chat turns end in <|im_end|> and whose texts end in <|endoftext|>;
    of its base models that is the only eos_token.
    """
    stops = {tokenizer.eos_token_id, turn_end(tokenizer)}
    declared = model.generation_config.eos_token_id
    stops.update(declared if isinstance(declared, list) else [declared])
    return sorted(stops - {None})


def turn_end(tokenizer):
    """The id of the token that the chat template writes right after an assistant's turn, at the end
    of a chat or else before the next turn; None where that is no token added for such a purpose."""
    answer = "Green"
    turns = [{"role": "user", "content": "Which"}, {"role": "assistant", "content": answer}]
    for messages in (turns, [*turns, turns[0]]):
        try:
            text = rendered(tokenizer, messages, tokenize=False)
        except Exception:  # of a template that takes no such chat, or of a tokenizer without one
            continue
        after = tokenizer(text.rpartition(answer)[2].lstrip(), add_special_tokens=False).input_ids
        if after and after[0] in tokenizer.added_tokens_decoder:
            return after[0]
    return None
