"""Supervised steps before GRPO, for a model that never writes the answer format of itself."""

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from llms import chat_prompt, completion_logprobs
from lora import trained_parameters
from optimizer import apply_gradients
from rldatasets import SYSTEM_PROMPT, worked_answer
from shared_prefix import micro_batches


def cold_start(policy, tokenizer, train_problems, args, accelerator):
    """Supervised steps on worked solutions, so that GRPO finds the answer format to reinforce.

    DeepSeek-R1 (2501.12948, section 2.3.1) starts the same way. Its batches are steps -N to -1 of
    the same stream of problems, mean loss per token, a fresh AdamW at a constant rate.
    """
    optimizer = torch.optim.AdamW(
        trained_parameters(policy), lr=args.cold_start_learning_rate, weight_decay=0.0, fused=True
    )
    steps = range(-args.cold_start_steps, 0)
    for step in tqdm(steps, desc="cold start", leave=False, disable=not steps):
        problems = train_problems.batch(step, args.questions_per_step)
        prompts, targets = (
            [torch.tensor(ids, device=accelerator.device) for ids in rows]
            for rows in zip(*(worked_ids(tokenizer, problem) for problem in problems))
        )
        ids = pad_sequence(targets, batch_first=True)  # (Q, C)
        lengths = [[len(target)] for target in targets]
        tokens = sum(map(len, targets))
        loss = 0.0
        for batch in micro_batches(prompts, lengths, args.micro_batch_tokens):
            with accelerator.autocast():
                logprobs = completion_logprobs(policy, batch, ids[batch.rows], 1.0)
            share = -logprobs.sum() / tokens
            share.backward()
            loss = loss + share.detach()
        apply_gradients(optimizer, loss, args.max_grad_norm)
        done = step + args.cold_start_steps + 1
        tqdm.write(f"cold start {done}/{args.cold_start_steps}: loss {loss.item():.3f}")


def worked_ids(tokenizer, problem):
    """(prompt, the worked solution in the answer format and the token that ends a turn)."""
    ids = tokenizer(worked_answer(problem), add_special_tokens=False).input_ids
    prompt = chat_prompt(tokenizer, SYSTEM_PROMPT, problem.question)
    return prompt, [*ids, tokenizer.eos_token_id]
