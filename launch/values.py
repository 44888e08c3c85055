"""What the values of flags may be: argparse's types, which turn a word into a value or say what is
wrong with it.
"""

import argparse
import json
import math
import re
from datetime import date

from tasks import dataset_names, is_on_hub
from utils import hint

# What --chat_template_kwargs may not hold: what transformers takes beside a template's arguments.
NOT_THE_TEMPLATES = {
    "enable_thinking", "messages", "conversation", "conversations", "chat_template", "tokenize",
    "add_generation_prompt", "continue_final_message", "padding", "truncation", "max_length",
    "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
    "sanitize_control_tokens", "self", "strftime_now",
}  # fmt: skip

# What --vllm_arguments may not hold: what engine.py and vllm_worker.py say themselves.
THE_ENGINES = {
    "model", "dtype", "load_format", "skip_tokenizer_init", "generation_config", "logprobs_mode",
}  # fmt: skip


def number(kind, low, high=math.inf, low_open=False):
    """An argparse type: an int or a finite float in [low, high], or (low, high] if `low_open`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        inside = (low < value if low_open else low <= value) and value <= high
        if not inside or value in (math.inf, -math.inf):
            name = "a whole number" if kind is int else "a finite number"
            bound = f" above {low:g}" if low_open else f" of at least {low:.10g}"
            bound = "" if low == -math.inf else bound
            # That nothing is counted beyond MOST is for whoever tries.
            known = high == math.inf or (high == MOST and value < low)
            limit = "" if known else f" and at most {high:.10g}"
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not {name}{bound}{limit}")
        return value

    return parse


MOST = 10**9  # of anything that is counted
COUNT = number(int, 0, MOST)
POSITIVE_COUNT = number(int, 1, MOST)
POSITIVE = number(float, 0, low_open=True)
NOT_NEGATIVE = number(float, 0)
SHARE = number(float, 0, 1)
RATE = number(float, 0, 1, low_open=True)
BETA = number(float, 0, math.nextafter(1, 0))


def weight(text):
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=WEIGHT, e.g. correctness=2")
    return name, number(float, -1e6, 1e6)(value)


def some_text(text):
    if not text or re.search("[\ud800-\udfff]", text):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is empty, or holds what is not text")
    return text


def day(text):
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no day YYYY-MM-DD") from None


def json_object(text):
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no JSON object in braces")
    return value


def engine_arguments(text):
    value = json_object(text)
    for name in THE_ENGINES & {*value}:
        raise argparse.ArgumentTypeError(f"{name} is what the run tells the engine; leave it out")
    return value


def template_arguments(text):
    value = json_object(text)
    for name in NOT_THE_TEMPLATES & {*value}:
        advice = "use the flag --enable_thinking" if name == "enable_thinking" else "leave it out"
        raise argparse.ArgumentTypeError(f"{name} is not for the template to be told; {advice}")
    return value


def known_dataset(text):
    if text.endswith(".py"):  # a task of one's own
        return text
    names = dataset_names()
    name = text.partition("/")[0]
    if name not in names and not is_on_hub(text):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is unknown; {hint(name[:40], names)}")
    return text
