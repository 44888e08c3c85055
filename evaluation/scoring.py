"""Completions in, `Rewards` out: every reward function on every completion, on its guard."""

import traceback
from contextlib import suppress
from dataclasses import dataclass
from statistics import fmean

import torch

from evaluation.referee import bound
from evaluator import sees_group
from grpo import completion_lengths, decoupled_advantages, group_advantages, overlong_penalty
from sampling.rollouts import last_turn, without_thoughts
from tasks import wants_referee
from utils import TimedOut, UserError, as_number, time_limit

LARGEST = 1e100  # of a reward in fp64, so that squares of weighted sums are finite


@dataclass(frozen=True)
class Rewards:
    """The scores of a step's completions, in fp64 up to the advantages: 0.8 + 0.1 differs from 0.9
    in fp32 by 6e-8. F reward functions, Q questions, G completions each."""

    names: list  # F function names
    per_function: torch.Tensor  # (Q, G, F), before the weights
    total: torch.Tensor  # (Q, G), the weighted sum over functions
    weights: torch.Tensor | None = None  # (F,); None where a file of rollouts does not say them


def advantages_of(rewards, args, chosen=None):
    """The advantages (Q, G) that the flags make of Rewards. chosen: (Q, G), those to train on."""
    if args.advantage_scale == "gdpo":
        return decoupled_advantages(rewards.per_function, rewards.weights, chosen)
    return group_advantages(rewards.total, args.advantage_scale, chosen, args.baseline)


def cut_off_thinking(text, answer, finished):
    """Whether a completion was cut off in its thoughts; None where it has none. answer: what of its
    text is judged."""
    text = last_turn(text)
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
    """Every reward function on every completion, or, of_group, on every question's completions.
    weights: {function name: weight}, 1 by default.

    Raises UserError naming function, question and completion (and the `file` that holds it whole)
    where a reward function raises, takes more than `timeout` seconds or returns something other
    than a finite number of at most LARGEST, of_group than a list of G such numbers.
    """

    reward_functions = with_step(reward_functions, rollouts, problems)

    def scores(function, texts, problem):
        if sees_group(function):
            return call_on_group(function, texts, problem, file, timeout)
        return [call(function, text, problem, file, timeout) for text in texts]

    columns = [
        [scores(function, texts, problem) for texts, problem in zip(rollouts.texts, problems)]
        for function in reward_functions
    ]
    names = [function.__name__ for function in reward_functions]
    shape = len(reward_functions), len(rollouts.texts), len(rollouts.texts[0])
    per_function = torch.tensor(columns, dtype=torch.float64, device="cpu").view(shape)
    per_function = per_function.movedim(0, -1).contiguous()  # (Q, G, F)
    factors = per_function.new_tensor([(weights or {}).get(name, 1.0) for name in names])  # (F,)
    return Rewards(names, per_function, (per_function * factors).sum(-1), factors)


def with_step(functions, rollouts, problems):
    """Rewards of which those that take `step` are given it: {question: its completions}, of all
    questions that this process scores now; where one is asked twice, the last ones."""
    step = {problem.question: tuple(texts) for texts, problem in zip(rollouts.texts, problems)}
    return [bound(function, step=step) for function in functions]


def judged_ahead(rollouts, problems, setup, functions=()):
    """Have whoever the rewards ask about these Rollouts answer at once: the referee, if there is
    one, in one batch, and with --reward_workers above 1 the processes of the task's verifier, where
    it has one, side by side. Rewards and verdicts, which ask one by one, find it judged; what takes
    more than --reward_timeout is left for them, and so are errors. functions: the rewards that are
    going to be called on groups.
    """
    task, args = setup.task, setup.args
    asking = [function for function in functions if wants_referee(function)]
    if asking := with_step(asking, rollouts, problems):
        setup.referees["referee"].ahead(asking, rollouts.texts, problems, args.reward_timeout)
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
        weights=parts[0].weights,
    )


def with_overlong_penalty(rewards, rollouts, args):
    """Rewards that --overlong_buffer, if any, has made a further function of: `overlong`."""
    if not args.overlong_buffer:
        return rewards
    lengths = completion_lengths(rollouts.completion_mask).cpu()  # (Q, G)
    penalty = overlong_penalty(lengths, args.max_completion_length, args.overlong_buffer)
    return with_another(rewards, "overlong", penalty)


def with_another(rewards, name, values):
    """Rewards with one more of this name, of weight 1. values: (Q, G), in fp64."""
    return Rewards(
        names=[*rewards.names, name],
        per_function=torch.cat([rewards.per_function, values[:, :, None]], dim=-1),
        total=rewards.total + values,
        weights=torch.cat([rewards.weights, rewards.weights.new_ones(1)]),
    )


def call(function, completion, problem, file=None, timeout=None, kind="reward function"):
    """What a function of a completion returns, as a float. Raises UserError, see `score`."""
    value, complaint = _value(function, completion, problem, timeout)
    number, wrong = _number(value)
    if complaint := complaint or wrong:
        raise _failure(f"{kind} {_name(function)} {complaint[:80]}", completion, problem, file)
    return number


def call_on_group(function, completions, problem, file=None, timeout=None):
    """What a reward of_group returns, as a list of floats. Raises UserError, see `score`."""
    at_fault = completions[0]
    value, complaint = _value(function, list(completions), problem, timeout)
    if not complaint:
        values = value.tolist() if hasattr(value, "tolist") else value  # of numpy or torch
        if not isinstance(values, list | tuple) or len(values) != len(completions):
            complaint = f"returned {shown(value)}, not {len(completions)} numbers"
    if not complaint:
        numbers, wrong = zip(*map(_number, values))
        if not any(wrong):
            return list(numbers)
        at_fault, complaint = next(pair for pair in zip(completions, wrong) if pair[1])
    raise _failure(f"reward function {_name(function)} {complaint[:80]}", at_fault, problem, file)


def _value(function, judged, problem, timeout):
    """(what a function makes of a completion or a group, None), or (None, what went wrong)."""
    try:
        with time_limit(timeout):
            return function(judged, problem), None
    except TimedOut:
        return None, f"took more than --reward_timeout {timeout:g} seconds"
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1].lineno
        return None, f"raised {type(error).__name__}: {error} (line {line})"


def _number(value):
    """(a value as a float, None), or (None, what is wrong with it)."""
    number = as_number(value)
    if number is None:
        return None, f"returned {shown(value)}, not a finite number"
    if abs(number) > LARGEST:
        return None, f"returned {number:g}, above {LARGEST:g} in size"
    return number, None


def _name(function):
    return getattr(function, "__name__", "is_correct")


def _failure(complaint, completion, problem, file):
    place = f"; see {file}" if file else ""
    return UserError(
        f"{complaint} for {problem.question[:40]!r}, completion {completion[:40]!r}{place}"
    )


def shown(value):
    """The start of what a value looks like; its type where it cannot be shown."""
    try:
        return f"{value!r:.40}"
    except Exception:  # an int of more than 4,300 digits, or a __repr__ of the user's
        return f"a {type(value).__name__}"
