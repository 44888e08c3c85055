"""The reward functions (edit them here), answer parsing, and evaluation on held-out problems.

To add a reward, write a function `name(completion, problem) -> float` and put it in
REWARD_FUNCTIONS. Its name is its key in the metrics, the logs and the plots; nothing else changes.
"""

import math
import re
import traceback
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from statistics import fmean

import torch

from llms import chat_prompt
from rldatasets import SYSTEM_PROMPT
from sampler import sample_rollouts
from utils import TimedOut, UserError, time_limit

TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")

# --- reading an answer -------------------------------------------------------------------------

# One number at the start, with at most a unit after it: "72", "-1,080", "$5.00", "50%", "8 clips."
NUMBER = re.compile(
    r"(?P<sign>[-\u2212+]?[$€£]?|[$€£][-\u2212])(?=\.?[0-9])"
    r"(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?P<fraction>\.[0-9]+)?"
    r"(?!\s*(?:k|dozen|hundred|thousand|million|billion)\b)\.?\s*%?[a-z\s]*\.?",
    re.IGNORECASE | re.ASCII,
)
INTEGER = re.compile(r"[-\u2212+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)")
LONGEST_NUMBER = 64  # characters; anything longer is not an answer to a grade-school problem


def parse_number(text):
    """The one number that `text` states, as an exact Decimal, or None.

    Currency sign, thousands commas, trailing ".0", percent sign, unit words after the number and
    the typographic minus are understood; two numbers, a fraction or words before it are not.
    """
    text = text.strip()
    if len(text) > LONGEST_NUMBER:
        return None
    match = NUMBER.fullmatch(text)
    if not match:
        return None
    value = Decimal((match["whole"] or "0").replace(",", "") + (match["fraction"] or ""))
    return -value if {"-", "\u2212"} & set(match["sign"]) else value


def extract_answer(completion):
    """The text between the answer tags, stripped; None unless both tags occur exactly once.

    Two answers are no answer, so hedging earns nothing. Text after the closing tag is ignored here
    (`tag_count` charges for it).
    """
    if completion.count("<answer>") != 1 or completion.count("</answer>") != 1:
        return None
    before, _, rest = completion.partition("<answer>")
    if "</answer>" in before:
        return None
    return rest.partition("</answer>")[0].strip()


def is_correct(completion, problem):
    """Whether the answer in the tags equals the gold answer: as numbers, or where the gold answer
    is not a number, as text, letter case and runs of white space aside."""
    answer = extract_answer(completion)
    if answer is None:
        return False
    gold = parse_number(problem.answer)
    if gold is not None:
        return parse_number(answer) == gold
    return answer.lower().split() == problem.answer.lower().split()


# --- reward functions: edit here ---------------------------------------------------------------


def correctness(completion, problem):
    """2.0 for the right answer, else 0."""
    return 2.0 if is_correct(completion, problem) else 0.0


def integer_format(completion, problem):
    """0.5 where the answer is an integer, sign and thousands commas allowed, else 0."""
    return 0.5 if INTEGER.fullmatch(extract_answer(completion) or "") else 0.0


def strict_format(completion, problem):
    """0.5 where the completion is the four tags, each alone on its line, with text between, and
    nothing else, else 0."""
    once = all(completion.count(tag) == 1 for tag in TAGS)
    text = completion.removesuffix("\n")
    if not (once and text.startswith("<reasoning>\n") and text.endswith("\n</answer>")):
        return 0.0
    inside = text.removeprefix("<reasoning>\n").removesuffix("\n</answer>")
    reasoning, tags, answer = inside.partition("\n</reasoning>\n<answer>\n")
    return 0.5 if tags and reasoning.strip() and answer.strip() else 0.0


def soft_format(completion, problem):
    """0.5 where one pair of reasoning tags is followed by one pair of answer tags, else 0."""
    places = [completion.find(tag) for tag in TAGS]
    once = all(completion.count(tag) == 1 for tag in TAGS)
    return 0.5 if once and places == sorted(places) else 0.0


def tag_count(completion, problem):
    """0.125 for each of the four tags that occurs exactly once and alone on its line, less 0.001
    for each character after the closing answer tag; never below 0."""
    framed = f"\n{completion}\n"
    in_place = sum(completion.count(tag) == 1 and f"\n{tag}\n" in framed for tag in TAGS)
    _, closing, after = completion.rpartition("</answer>")
    excess = len(after.strip()) if closing else 0
    return max(0.0, 0.125 * in_place - 0.001 * excess)


REWARD_FUNCTIONS = [correctness, integer_format, strict_format, soft_format, tag_count]

# --- scoring -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rewards:
    """The scores of a step's completions. F reward functions, Q questions, G completions each."""

    names: list  # F function names
    per_function: torch.Tensor  # (Q, G, F), before the weights
    total: torch.Tensor  # (Q, G), the weighted sum over functions


def score(rollouts, problems, reward_functions, weights=None, file=None, timeout=None):
    """Every reward function on every completion. weights: {function name: weight}, 1 by default.

    Raises UserError naming function, question and completion (and the `file` that holds it whole)
    where a reward function raises, takes more than `timeout` seconds or returns something other
    than a finite number.
    """
    scores = [
        [
            [_reward(function, text, problem, file, timeout) for function in reward_functions]
            for text in texts
        ]
        for texts, problem in zip(rollouts.texts, problems)
    ]
    names = [function.__name__ for function in reward_functions]
    per_function = torch.tensor(scores, dtype=torch.float32, device="cpu")  # (Q, G, F)
    factors = per_function.new_tensor([(weights or {}).get(name, 1.0) for name in names])  # (F,)
    return Rewards(names, per_function, (per_function * factors).sum(-1))


def joined_rewards(parts):
    """The Rewards of several draws of questions as one."""
    return Rewards(
        names=parts[0].names,
        per_function=torch.cat([part.per_function for part in parts]),
        total=torch.cat([part.total for part in parts]),
    )


def _reward(function, completion, problem, file, timeout):
    complaint = None
    try:
        with time_limit(timeout):
            value = function(completion, problem)
    except TimedOut:
        complaint = f"took more than --reward_timeout {timeout:g} seconds"
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1].lineno
        complaint = f"raised {type(error).__name__}: {error} (line {line})"
    else:
        if not isinstance(value, Real) or not math.isfinite(value):
            complaint = f"returned {value!r}, not a finite number"
    if complaint:
        place = f"; see {file}" if file else ""
        raise UserError(
            f"reward function {function.__name__} {complaint[:80]} for {problem.question[:40]!r}, "
            f"completion {completion[:40]!r}{place}"
        )
    return float(value)


# --- evaluation --------------------------------------------------------------------------------


def wilson_interval(successes, trials, z=1.959964):
    """The 95 % Wilson score interval of a proportion (Wilson 1927), as (low, high)."""
    share = successes / trials
    centre = share + z * z / (2 * trials)
    margin = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - margin) / scale), min(1.0, (centre + margin) / scale)


def evaluate(
    model, tokenizer, problems, max_new_tokens, batch_size, reward_functions, tick=None,
    reward_timeout=None,
):  # fmt: skip
    """Answer every problem greedily. Returns (summary, records), one record per problem.

    Accuracy is computed here by `is_correct`, not from a reward, so that editing the rewards cannot
    change it. `tick(n)` is called after each batch of n problems.
    """
    prompts = [chat_prompt(tokenizer, SYSTEM_PROMPT, problem.question) for problem in problems]
    records = [None] * len(problems)
    # Prompts of like length share a batch: less padding.
    order = sorted(range(len(problems)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        asked = [problems[i] for i in chosen]
        rollouts = sample_rollouts(
            model, tokenizer, [prompts[i] for i in chosen], 1, max_new_tokens, temperature=0
        )
        rewards = score(rollouts, asked, reward_functions, timeout=reward_timeout)
        lengths = rollouts.completion_mask.sum(-1).flatten().tolist()
        scores = rewards.per_function.flatten(0, 1).tolist()
        for i, problem, [text], length, [finished], row in zip(
            chosen, asked, rollouts.texts, lengths, rollouts.finished.tolist(), scores
        ):
            records[i] = {
                "question": problem.question,
                "answer": problem.answer,
                "completion": text,
                "parsed": extract_answer(text),
                "correct": is_correct(text, problem),
                "format": soft_format(text, problem) > 0,
                "length": length,
                "finished": finished,
                "rewards": dict(zip(rewards.names, row)),
            }
        if tick:
            tick(len(chosen))
    correct = sum(record["correct"] for record in records)
    low, high = wilson_interval(correct, len(records))
    summary = {
        "problems": len(records),
        "accuracy": correct / len(records),
        "accuracy_low": low,
        "accuracy_high": high,
        "format_rate": fmean(record["format"] for record in records),
        "completion_length": fmean(record["length"] for record in records),
        "truncated": fmean(not record["finished"] for record in records),
        **{
            f"rewards/{function.__name__}": fmean(
                record["rewards"][function.__name__] for record in records
            )
            for function in reward_functions
        },
    }
    return summary, records
