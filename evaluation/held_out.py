"""Answering held-out problems: greedily, and by sampling where pass@k is asked for."""

import time

from tqdm import tqdm

from comparison import summarize
from evaluator import (
    call,
    extract_answer,
    has_format,
    is_correct_leniently,
    last_number,
    score,
)
from llms import chat_prompt, load_model
from processes import everyones, make_accelerator, own_part
from runlog import Run, evaluation_table
from sampler import sample_rollouts
from sharding import whole
from tasks import load_task
from utils import UserError, hub_token, mixed_seed, phase


def evaluate(
    model, tokenizer, problems, max_new_tokens, batch_size, task, tick=None,
    samples=0, temperature=1.0, seed=0, reward_timeout=None,
):  # fmt: skip
    """Answer every problem greedily. Returns records, one per problem, for `summarize`.

    Accuracy is the task's `is_correct`, not a reward, so that editing the rewards cannot change
    it. With `samples`, that many more answers to each problem are drawn at `temperature`,
    from `seed` and the question alone. `tick(n)` is called after each batch of n problems.
    """
    prompts = [chat_prompt(tokenizer, task.system_prompt, problem.question) for problem in problems]
    records = [None] * len(problems)
    # Prompts of like length share a batch: less padding.
    order = sorted(range(len(problems)), key=lambda i: len(prompts[i]))

    def batches(size, **sampling):
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            rollouts = sample_rollouts(
                model, tokenizer, [prompts[i] for i in chosen], max_new_tokens=max_new_tokens,
                **sampling,
            )  # fmt: skip
            yield chosen, rollouts
            if tick:
                tick(len(chosen))

    for chosen, rollouts in batches(batch_size, group_size=1, temperature=0):
        rewards = score(
            rollouts, [problems[i] for i in chosen], task.reward_functions, timeout=reward_timeout
        )
        lengths = rollouts.completion_mask.sum(-1).flatten().tolist()
        scores = rewards.per_function.flatten(0, 1).tolist()
        for i, [text], length, [finished], row in zip(
            chosen, rollouts.texts, lengths, rollouts.finished.tolist(), scores
        ):
            records[i] = {
                "question": problems[i].question,
                "prompt": tokenizer.decode(prompts[i]),
                "answer": problems[i].answer,
                "completion": text,
                **verdicts(text, problems[i], task, reward_timeout),
                "format": has_format(text),
                "length": length,
                "finished": finished,
                "rewards": dict(zip(rewards.names, row)),
            }
    if samples:
        size = max(1, batch_size // samples)  # as many rows as before
        seeds = (mixed_seed(seed, problems[i].question) for i in order)
        for chosen, rollouts in batches(
            size, group_size=samples, temperature=temperature, seeds=seeds
        ):
            for i, texts in zip(chosen, rollouts.texts):
                records[i]["samples"] = [
                    {"completion": text, **verdicts(text, problems[i], task, reward_timeout)}
                    for text in texts
                ]
    return records


def verdicts(completion, problem, task, timeout):
    """What a completion answers and whether that is right: by the task, and leniently."""
    correct = bool(call(task.is_correct, completion, problem, None, timeout, "the task's"))
    return {
        "parsed": extract_answer(completion),
        "lenient_parsed": last_number(completion),
        "correct": correct,
        "lenient_correct": correct or is_correct_leniently(completion, problem),
    }


def evaluate_policy(policy, tokenizer, problems, args, accelerator, task, step):
    """`evaluate` as the flags say, with a progress bar; samples depend on (seed, step) alone.

    Each process answers its part of the problems. The summary also says how many seconds it took.
    """
    started = time.perf_counter()
    passes = 2 if args.eval_samples else 1
    own = own_part(problems, accelerator)
    with (
        tqdm(total=passes * len(own), desc="evaluating", leave=False) as bar,
        accelerator.autocast(),
        whole(policy),
    ):
        records = evaluate(
            policy, tokenizer, own, args.max_completion_length, args.eval_batch_size,
            task, bar.update, args.eval_samples, args.temperature,
            mixed_seed(args.seed, step, "evaluation"), args.reward_timeout,
        )  # fmt: skip
    records = [record for part in everyones(records, accelerator) for record in part]
    summary = {**summarize(records), "seconds/evaluation": time.perf_counter() - started}
    return summary, records


def check_room(policy, tokenizer, problems, max_completion_length, task):
    """Raise UserError where a prompt, never cut and never left out, leaves no room to answer."""
    longest = max(len(chat_prompt(tokenizer, task.system_prompt, p.question)) for p in problems)
    context = policy.config.max_position_embeddings
    if longest + max_completion_length > context:
        raise UserError(f"--max_completion_length {max_completion_length}: with the longest "
                        f"test prompt of {longest} tokens it exceeds the model's context of "
                        f"{context}")  # fmt: skip


def evaluate_and_save(args):
    """Evaluate one model and write what an evaluation in training writes, as step 0 of a run."""
    accelerator = make_accelerator()
    task = load_task(args)
    problems = task.problems("test")[: args.eval_problems or None]
    policy, tokenizer = load_model(args.model_name, accelerator.device, hub_token())
    check_room(policy, tokenizer, problems, args.max_completion_length, task)
    run = Run(args.output_dir)
    run.save_config(args, str(accelerator.device), test_problems=len(problems))
    with phase("evaluation"):
        summary, records = evaluate_policy(
            policy, tokenizer, problems, args, accelerator, task, step=0
        )
    run.log_evaluation(0, summary, records)
    print("\n".join([*evaluation_table({args.model_name: summary}), f"It is in {run.path}."]))
