"""Supervised steps before GRPO, for a model that never writes the answer format of itself."""

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from rldatasets import Problems
from training.logprobs import completion_logprobs
from training.lora import trained_parameters
from training.optimizer import apply_gradients
from training.processes import sum_gradients, summed
from training.progress import progress
from training.sharding import own_batches, whole


def cold_start(setup, train_problems, chat_prompt, worked_ids, pictures_of=None):
    """Supervised steps on worked solutions, so that GRPO finds the answer format to reinforce.

    chat_prompt(tokenizer, system_prompt, question, images): a prompt's ids. worked_ids(tokenizer,
    problems, task): for each the ids of its worked answer, and which of these it is to learn.
    pictures_of(policy, tokenizer, prompts, problems): what the prompts show, see vision/sight.py.

    DeepSeek-R1 (2501.12948, section 2.3.1) starts the same way. Its batches are steps -N to -1 of
    the same stream of problems, mean loss per token, a fresh AdamW at a rate that is constant or
    falls, see --cold_start_schedule. Solutions that GRPO would cut off are left out, see `fitting`.
    """
    policy, args, accelerator = setup.policy, setup.args, setup.accelerator
    optimizer = torch.optim.AdamW(
        trained_parameters(policy), lr=args.cold_start_learning_rate, weight_decay=0.0, fused=True
    )
    steps = range(-args.cold_start_steps, 0)
    train_problems = fitting(setup, train_problems, worked_ids) if steps else train_problems
    for step in steps:
        optimizer.param_groups[0]["lr"] = rate_at(args, -step)
        problems = train_problems.batch(step, args.questions_per_step)
        asked = [
            chat_prompt(setup.tokenizer, setup.task.system_prompt, p.question, p.images)
            for p in problems
        ]
        pictures = None
        if pictures_of:
            with accelerator.autocast(), whole(policy):
                pictures = pictures_of(policy, setup.tokenizer, asked, problems)
        worked = worked_ids(setup.tokenizer, problems, setup.task)
        prompts, targets, written = (
            [torch.tensor(row, device=accelerator.device) for row in rows]
            for rows in (asked, *zip(*worked))
        )
        ids, mask = (pad_sequence(rows, batch_first=True) for rows in (targets, written))  # (Q, C)
        lengths = [[len(target)] for target in targets]
        own, _, batches, idle = own_batches(setup, prompts, lengths, ids, pictures)
        tokens = int(mask.sum())
        mine = torch.tensor(own, device=accelerator.device)[:, None] & mask  # (Q, C)
        loss = torch.zeros((), device=accelerator.device)
        for batch in batches + idle:
            with accelerator.autocast():
                logprobs, _ = completion_logprobs(policy, batch, ids[batch.rows], 1.0)
            share = -(logprobs * mine[batch.rows]).sum() / tokens
            (share * setup.loss_scale.scale).backward()
            loss = loss + share.detach()
            del logprobs, share  # as in update.forward_and_backward
        loss = summed({"loss": loss}, accelerator)["loss"]
        sum_gradients(optimizer, accelerator)
        apply_gradients(optimizer, loss, args.max_grad_norm, setup.loss_scale)
        done = step + args.cold_start_steps + 1
        progress.tick(1, "steps", of=len(steps))
        progress.tick(sum(map(len, prompts)) + tokens, "tokens")
        tqdm.write(f"cold start {done}/{args.cold_start_steps}: loss {loss.item():.3f}")


def rate_at(args, left):
    """The learning rate where so many steps are left, this one included."""
    share = left / args.cold_start_steps if args.cold_start_schedule == "linear" else 1
    return args.cold_start_learning_rate * share


def fitting(setup, problems, worked_ids):
    """The Problems whose worked answer, and the token that ends it, is no longer than
    --max_completion_length; all where none is, for then the format is what there is to learn.
    Says how many are left out."""
    most = setup.args.max_completion_length
    worked = worked_ids(setup.tokenizer, problems, setup.task)
    fit = [problem for problem, (ids, _) in zip(problems, worked) if len(ids) <= most]
    if len(fit) == len(problems):
        return problems
    count = f"{len(problems) - len(fit)} of {len(problems)} worked solutions"
    if not fit:
        tqdm.write(f"cold start: {count} are longer than --max_completion_length {most}: it "
                   "teaches what will be cut off; raise it")  # fmt: skip
        return problems
    tqdm.write(f"cold start: {count} left out: they are longer than --max_completion_length {most}")
    return Problems(fit, problems.seed)
