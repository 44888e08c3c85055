"""Completions in, `Rewards` out: every reward function on every completion, on its guard."""

import traceback
from contextlib import suppress
from dataclasses import dataclass, replace
from statistics import fmean

import torch

from evaluator import after_thoughts
from grpo import overlong_penalty
from llms import rendering_on
from utils import TimedOut, UserError, as_number, time_limit

LARGEST = 1e100  # of a reward in fp64, so that squares of weighted sums are finite


@dataclass(frozen=True)
class Rewards:
    """The scores of a step's completions, in fp64 up to the advantages: 0.8 + 0.1 differs from 0.9
    in fp32 by 6e-8. F reward functions, Q questions, G completions each."""

    names: list  # F function names
    per_function: torch.Tensor  # (Q, G, F), before the weights
    total: torch.Tensor  # (Q, G), the weighted sum over functions


def without_thoughts(rollouts, setup):
    """The Rollouts with texts that are judged, by rewards, formats and accuracy alike: of a model
    that thinks, what follows the last </think> and its blanks, and nothing while it still thinks.

    Where the task's system prompt asks for the tags itself, they are a part of the answer, and all
    of it is judged.
    """
    if "<think>" in setup.task.system_prompt:
        return rollouts
    thinking = rendering_on(setup.tokenizer).opens_thinking
    texts = [[after_thoughts(text, thinking) for text in texts] for texts in rollouts.texts]
    return replace(rollouts, texts=texts)


def cut_off_thinking(text, answer, finished):
    """Whether a completion was cut off in its thoughts; None where it has none. answer: what of its
    text is judged."""
    return None if text == answer else not finished and "</think>" not in text


def truncated_thinking(rollouts, setup):
    """{"truncated_thinking": the share of completions cut off while thinking}; {} where none
    thinks."""
    judged, finished = without_thoughts(rollouts, setup).texts, rollouts.finished.tolist()
    cut_off = [
        cut_off_thinking(*of_one)
        for of_group in zip(rollouts.texts, judged, finished)
        for of_one in zip(*of_group)
    ]
    if all(one is None for one in cut_off):
        return {}
    return {"truncated_thinking": fmean(map(bool, cut_off))}


def score(rollouts, problems, reward_functions, weights=None, file=None, timeout=None):
    """Every reward function on every completion. weights: {function name: weight}, 1 by default.

    Raises UserError naming function, question and completion (and the `file` that holds it whole)
    where a reward function raises, takes more than `timeout` seconds or returns something other
    than a finite number of at most LARGEST.
    """
    scores = [
        [
            [call(function, text, problem, file, timeout) for function in reward_functions]
            for text in texts
        ]
        for texts, problem in zip(rollouts.texts, problems)
    ]
    names = [function.__name__ for function in reward_functions]
    per_function = torch.tensor(scores, dtype=torch.float64, device="cpu")  # (Q, G, F)
    factors = per_function.new_tensor([(weights or {}).get(name, 1.0) for name in names])  # (F,)
    return Rewards(names, per_function, (per_function * factors).sum(-1))


def judged_ahead(rollouts, problems, setup):
    """With --reward_workers above 1, have the processes of the task's verifier, where it has one,
    judge these Rollouts side by side. Rewards and verdicts, which ask one by one, find it judged;
    what takes more than --reward_timeout is left for them, and so are errors.
    """
    task, args = setup.task, setup.args
    if task.judge is None or args.reward_workers == 1:
        return
    requests = []
    for texts, problem in zip(rollouts.texts, problems):
        for text in texts:
            with suppress(Exception):
                requests.append(task.judge_request(text, problem))
    asked = [request for request in requests if request is not None]
    task.judge.ahead(asked, args.reward_workers, args.reward_timeout)


def joined_rewards(parts):
    """The Rewards of several draws of questions as one."""
    return Rewards(
        names=parts[0].names,
        per_function=torch.cat([part.per_function for part in parts]),
        total=torch.cat([part.total for part in parts]),
    )


def with_overlong_penalty(rewards, rollouts, args):
    """Rewards that --overlong_buffer, if any, has made a further function of: `overlong`."""
    if not args.overlong_buffer:
        return rewards
    lengths = rollouts.completion_mask.sum(-1).cpu()  # (Q, G)
    penalty = overlong_penalty(lengths, args.max_completion_length, args.overlong_buffer)
    return Rewards(
        names=[*rewards.names, "overlong"],
        per_function=torch.cat([rewards.per_function, penalty[:, :, None]], dim=-1),
        total=rewards.total + penalty,
    )


def call(function, completion, problem, file=None, timeout=None, kind="reward function"):
    """What a function of a completion returns, as a float. Raises UserError, see `score`."""
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
        number = as_number(value)
        if number is None:
            complaint = f"returned {shown(value)}, not a finite number"
        elif abs(number) > LARGEST:
            complaint = f"returned {number:g}, above {LARGEST:g} in size"
    if complaint:
        place = f"; see {file}" if file else ""
        name = getattr(function, "__name__", "is_correct")
        raise UserError(
            f"{kind} {name} {complaint[:80]} for {problem.question[:40]!r}, "
            f"completion {completion[:40]!r}{place}"
        )
    return number


def shown(value):
    """The start of what a value looks like; its type where it cannot be shown."""
    try:
        return f"{value!r:.40}"
    except Exception:  # an int of more than 4,300 digits, or a __repr__ of the user's
        return f"a {type(value).__name__}"
