"""Answering held-out problems: greedily, and by sampling where pass@k is asked for."""

import time
from argparse import Namespace
from dataclasses import replace
from functools import partial
from itertools import islice
from statistics import fmean

from evaluation.blind import with_others_pictures
from evaluation.comparison import summarize
from evaluation.scoring import call, cut_off_thinking, judged_ahead, score
from evaluation.significance import wilson_interval, with_interval
from evaluator import (
    extract_answer,
    has_format,
    is_correct_leniently,
    last_number,
    sees_group,
)
from llms import prompt_of
from rldatasets import completion_fields, completion_of, shown_fields
from sampling.groups import sample_rollouts
from sampling.rebuttals import with_rebuttals
from sampling.rollouts import judged_text, without_thoughts
from sampling.turns import between_turns, replies
from training.processes import everyones, from_main, own_part
from training.progress import progress
from training.sharding import whole
from utils import UserError, as_number, context_of, mixed_seed, named
from vision.sight import pictures_of


def evaluate(setup, problems, seed=0, tick=None):
    """Answer every problem greedily. Returns records, one per problem, for `summarize`.

    Accuracy is the task's `is_correct`, not a reward, so that editing the rewards cannot change
    it. With --eval_samples, that many more answers to each problem are drawn at --temperature, from
    `seed` and the question alone. `tick(n)` is called after each batch of n problems.
    """
    args, task, tokenizer = setup.args, setup.task, setup.tokenizer
    timeout = args.reward_timeout
    prompts = [prompt_of(tokenizer, task, problem) for problem in problems]
    functions = [f for f in task.reward_functions if not sees_group(f)]  # one answer has no group
    records = [None] * len(problems)
    # Prompts of like length share a batch: less padding. So do problems that belong together.
    order = sorted(range(len(problems)), key=lambda i: len(prompts[i - i % task.together]))

    def batches(size, group_size, temperature, seeds=()):
        size, seeds = max(1, size // task.together) * task.together, iter(seeds)
        sample = partial(
            sample_rollouts, setup.policy, tokenizer, temperature=temperature, stop=args.stop
        )
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            asked, now = [prompts[i] for i in chosen], [problems[i] for i in chosen]
            drawn = [*islice(seeds, len(chosen))]
            rollouts = sample(
                asked, group_size=group_size, max_new_tokens=args.max_completion_length,
                seeds=drawn, reply=replies(setup, now),
                pictures=pictures_of(setup.policy, tokenizer, asked, now),
            )  # fmt: skip
            rollouts = with_rebuttals(setup, now, rollouts, sample, drawn)
            judged = without_thoughts(rollouts, setup)
            judged_ahead(judged, now, setup)
            yield chosen, rollouts, judged
            if tick:
                tick(len(chosen))

    for chosen, rollouts, judged in batches(args.eval_batch_size, group_size=1, temperature=0):
        rewards = score(judged, [problems[i] for i in chosen], functions, timeout=timeout)
        lengths = rollouts.completion_mask.sum(-1).flatten().tolist()
        scores = rewards.per_function.flatten(0, 1).tolist()
        for i, [text], [answer], length, [finished], row in zip(
            chosen, rollouts.texts, judged.texts, lengths, rollouts.finished.tolist(), scores
        ):
            records[i] = {
                "question": problems[i].question,
                "prompt": tokenizer.decode(prompts[i]),
                "answer": problems[i].answer,
                **shown_fields(problems[i]),
                **completion_fields(text),
                **verdicts(answer, problems[i], task, timeout),
                "format": has_format(answer),
                "length": length,
                "finished": finished,
                "rewards": dict(zip(rewards.names, row)),
            }
            if (cut_off := cut_off_thinking(text, answer, finished)) is not None:
                records[i]["truncated_thinking"] = cut_off
    if samples := args.eval_samples:
        size = max(1, args.eval_batch_size // samples)  # as many rows as before
        seeds = (mixed_seed(seed, problems[i].question) for i in order)
        for chosen, rollouts, judged in batches(
            size, group_size=samples, temperature=args.temperature, seeds=seeds
        ):
            for i, texts, answers in zip(chosen, rollouts.texts, judged.texts):
                records[i]["samples"] = [
                    completion_fields(text) | verdicts(answer, problems[i], task, timeout)
                    for text, answer in zip(texts, answers)
                ]
    return records


def verdicts(completion, problem, task, timeout):
    """What a completion, less its thoughts, answers and whether that is right: by the task, and
    leniently."""
    correct = bool(call(task.is_correct, completion, problem, None, timeout, "the task's"))
    return {
        "parsed": extract_answer(completion),
        "lenient_parsed": last_number(completion),
        "correct": correct,
        "lenient_correct": correct or is_correct_leniently(completion, problem),
    }


def evaluate_policy(setup, problems, step):
    """`evaluate`, whose progress is shown; samples depend on (seed, step) alone. Questions that
    show something are asked blindly as well, see blind.py.

    Each process answers its part of the problems. Returns (summary, records); the summary also says
    how many seconds it took.
    """
    started = time.perf_counter()
    args, accelerator = setup.args, setup.accelerator
    passes = 2 if args.eval_samples else 1
    own = own_part(problems, accelerator, setup.task.together)
    blind = own_part(with_others_pictures(problems), accelerator)
    greedy = replace(setup, args=Namespace(**{**vars(args), "eval_samples": 0}))
    with (
        accelerator.autocast(),
        whole(setup.policy),
    ):
        tick = partial(progress.tick, unit="answers", of=passes * len(own) + len(blind))
        records = evaluate(setup, own, mixed_seed(args.seed, step, "evaluation"), tick)
        guesses = evaluate(greedy, [problem for _, problem in blind], tick=tick)
    records = [record for part in everyones(records, accelerator) for record in part]
    guesses = list(zip((index for index, _ in blind), guesses))
    for index, guess in (pair for part in everyones(guesses, accelerator) for pair in part):
        records[index] |= {f"blind_{name}": guess[name] for name in ("completion", "correct")}
    summary = summarize(records) | measured(setup, problems, records)
    return {**summary, "seconds/evaluation": time.perf_counter() - started}, records


def measured(setup, problems, records):
    """The task's own figures of these answers, if it has any, as means with their 95 % intervals;
    they may ask the referee."""
    task, accelerator = setup.task, setup.accelerator
    if task.measured is None:
        return {}
    answers = [judged_text(completion_of(record), setup) for record in records]
    referee = setup.referees.get("referee")
    figures = from_main(lambda: task.measured(problems, answers, referee), accelerator)
    if referee:
        referee.counts()  # what was asked here is no step's
    values = [*figures.values()] if isinstance(figures, dict) else [None]
    if not all(isinstance(row, list) and all(map(is_share, row)) for row in values):
        raise UserError(f"the task's measured returned {figures!r:.60}, not {{name: [numbers from "
                        "0 to 1]}")  # fmt: skip
    summary = {}
    for name, values in figures.items():
        if values:
            bounds = wilson_interval(sum(values), len(values))
            summary |= with_interval(name, fmean(values), *bounds)
    return summary


def is_share(value):
    number = as_number(value)
    return number is not None and 0 <= number <= 1


def an_eighth(held_out):
    """A fixed eighth of the held-out problems, or of the records of their answers."""
    return held_out[::8]


def check_room(policy, tokenizer, problems, args, task):
    """Raise UserError where a prompt, never cut and never left out, leaves no room to answer, or
    where the chat has no room for the further turns of a task with replies."""
    if task.reply or args.rebuttals:
        between_turns(tokenizer)
    longest = max(len(prompt_of(tokenizer, task, problem)) for problem in problems)
    context = context_of(policy.config.to_dict())
    if longest + args.max_completion_length > context:
        raise UserError(f"{named(args, 'max_completion_length')}: with the longest test prompt of "
                        f"{longest} tokens it exceeds the model's context of "
                        f"{context}")  # fmt: skip
