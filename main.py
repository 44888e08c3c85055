"""GRPO on one GPU: `python main.py` trains Qwen2.5-1.5B-Instruct on GSM8K.

In here: the training loop (`train`), one update (`update_policy`) and the cold start. The rest of
GRPO is one file each: sampling a group in sampler.py, the rewards in evaluator.py, advantages and
loss in grpo.py. Left out on purpose: a value network (the group's mean is the baseline), reward
models (rewards are functions), several GPUs, and any trainer class to look behind.

Q questions per step, G completions per question, P prompt tokens, C completion tokens.
"""

import signal
import sys

from flags import parse_args
from utils import Stopwatch, UserError, hub_token, keep_freed_memory, mixed_seed

if __name__ == "__main__":  # before the imports below, which take seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends them without a traceback
    ARGS = parse_args()
    keep_freed_memory()

import math
from statistics import fmean

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from evaluator import REWARD_FUNCTIONS, evaluate, score
from grpo import group_advantages, grpo_loss, token_weights
from llms import (
    chat_prompt,
    completion_logprobs,
    frozen_copy,
    load_model,
    mix_into,
    token_logprobs,
)
from paged_sampler import sample_rollouts_paged
from plotter import plot_run
from rldatasets import SYSTEM_PROMPT, Problems, load_problems, worked_answer
from runlog import Run, show_progress, step_metrics, summary_table
from sampler import sample_rollouts


def train(args):
    """One run, from the loaded model to the saved one."""
    on_gpu = torch.cuda.is_available()
    accelerator = Accelerator(cpu=not on_gpu, mixed_precision="bf16" if on_gpu else "no")
    set_seed(args.seed)
    policy, tokenizer, train_problems, test_problems, facts = load(args, accelerator)
    run = Run(args.output_dir)
    run.save_config(args, str(accelerator.device), **facts)

    cold_start(policy, tokenizer, train_problems, args, accelerator)
    reference = frozen_copy(policy) if args.kl_beta > 0 else None
    optimizer, scheduler = make_optimizer(policy, args)

    def evaluation(step):
        with tqdm(total=len(test_problems), desc="evaluating", leave=False) as bar:
            with accelerator.autocast():
                summary, records = evaluate(
                    policy, tokenizer, test_problems, args.max_completion_length,
                    args.eval_batch_size, REWARD_FUNCTIONS, bar.update,
                )  # fmt: skip
        run.log_evaluation(step, summary, records)
        return summary

    before = after = evaluation(step=0)
    with tqdm(total=args.num_train_iters, desc="GRPO", unit="step") as bar:
        for step in range(args.num_train_iters):
            stopwatch = Stopwatch(torch.cuda.synchronize if on_gpu else None)
            problems = train_problems.batch(step, args.questions_per_step)  # Q
            with stopwatch("sampling"):
                rollouts = sample_groups(policy, tokenizer, problems, step, args, accelerator)
            with stopwatch("rewards"):
                file, rows = run.save_rollouts(step, problems, rollouts)
                rewards = score(rollouts, problems, REWARD_FUNCTIONS, args.reward_weights, file)
                advantages = group_advantages(rewards.total, args.advantage_scale)  # (Q, G)
                run.save_rewards(file, rows, rewards, advantages)
            update = update_policy(
                policy, reference, optimizer, rollouts, advantages, args, accelerator, stopwatch
            )
            update["learning_rate"] = scheduler.get_last_lr()[0]
            scheduler.step()
            done = step + 1
            if args.update_ref_model and is_due(done, args.update_ref_model_freq):
                mix_into(reference, policy, args.ref_model_mixup_alpha)
            if is_due(done, args.eval_iterations) or done == args.num_train_iters:
                with stopwatch("evaluation"):
                    after = evaluation(done)
            metrics = step_metrics(step, rollouts, rewards, update, stopwatch.seconds)
            run.log_step(metrics)
            if is_due(done, args.save_steps):
                run.save_model(policy, tokenizer, f"checkpoints/step_{done:05d}")
                plot_run(run.path)
            show_progress(bar, metrics, after, rollouts.texts[0][0] if args.verbose else None)
    run.save_model(policy, tokenizer, "model")
    plot_run(run.path)
    print(summary_table(run.path, before, after))


def load(args, accelerator):
    """Data, then model: (policy, tokenizer, train problems, test problems, facts for config.json).

    Raises UserError, before anything is written, for whatever only the files themselves can tell.
    """
    if accelerator.num_processes > 1:
        raise UserError("several processes are not supported: start it with `python main.py`")
    names = [function.__name__ for function in REWARD_FUNCTIONS]
    for name in args.reward_weights:
        if name not in names:
            raise UserError(f"--reward_weights {name}: no such reward; there are {' '.join(names)}")
    train_problems, test_problems = (
        load_problems(args.dataset_name, args.dataset_path, split, args.seed, args.difficulty)
        for split in ("train", "test")
    )
    if args.cold_start_steps and not all(problem.solution for problem in train_problems):
        raise UserError(f"--cold_start_steps {args.cold_start_steps}: the data has no worked "
                        "solutions (field `solution`); set it to 0")  # fmt: skip
    test_problems = test_problems[: args.eval_problems or None]
    policy, tokenizer = load_model(args.model_name, accelerator.device, hub_token())

    def prompt_length(problem):
        return len(chat_prompt(tokenizer, SYSTEM_PROMPT, problem.question))

    fitting = [p for p in train_problems if prompt_length(p) <= args.max_prompt_length]
    left_out = len(train_problems) - len(fitting)
    if left_out:
        print(f"{left_out} of {len(train_problems)} training questions left out: their prompts are "
              f"longer than --max_prompt_length {args.max_prompt_length}")  # fmt: skip
    if not fitting:
        raise UserError(f"--max_prompt_length {args.max_prompt_length}: no training prompt is that "
                        "short; raise it")  # fmt: skip
    longest = max(map(prompt_length, test_problems))  # never cut, never left out
    if longest + args.max_completion_length > policy.config.max_position_embeddings:
        raise UserError(f"--max_completion_length {args.max_completion_length}: with the longest "
                        f"test prompt of {longest} tokens it exceeds the model's context of "
                        f"{policy.config.max_position_embeddings}")  # fmt: skip
    facts = {
        "train_problems": len(fitting),
        "left_out": left_out,
        "test_problems": len(test_problems),
    }
    return policy, tokenizer, Problems(fitting, args.seed), test_problems, facts


def is_due(done, every):
    return every > 0 and done % every == 0


def sample_groups(policy, tokenizer, problems, step, args, accelerator):
    """G completions for each of the step's questions, from the policy as it is now."""
    generator = torch.Generator(accelerator.device).manual_seed(mixed_seed(args.seed, step))
    prompts = [chat_prompt(tokenizer, SYSTEM_PROMPT, problem.question) for problem in problems]
    common = (policy, tokenizer, prompts, args.group_size, args.max_completion_length)
    with accelerator.autocast():
        if args.sampler == "paged":
            return sample_rollouts_paged(*common, args.temperature, generator)
        return sample_rollouts(
            *common, args.temperature, generator, args.top_k, args.top_p, args.min_p,
            args.compile_sampler,
        )  # fmt: skip


def update_policy(policy, reference, optimizer, rollouts, advantages, args, accelerator, stopwatch):
    """One optimizer update per inner epoch on the step's completions. Returns metrics.

    The loss is a weighted sum over tokens whose weights come from the whole step, so micro-batches
    simply add up (see grpo.token_weights). A group whose completions all earned the same has no
    advantage and, without a KL term, no gradient: it is left out. An update whose loss or gradient
    is not finite changes nothing.
    """
    mask = rollouts.completion_mask  # (Q, G, C)
    if args.mask_truncated:
        mask = mask & rollouts.finished[:, :, None]
    weights = token_weights(mask, args.aggregation, args.max_completion_length)  # (Q, G, C)
    advantages = advantages.to(weights.device)
    learnable = (advantages != 0).any(-1) | (reference is not None)  # (Q,)
    pieces = micro_batches(mask, learnable, args.micro_batch_size)
    trained_tokens = (mask & learnable[:, None, None]).sum().clamp(min=1)

    def logprobs_of(model, question, rows, length):
        with accelerator.autocast():
            return completion_logprobs(
                model,
                rollouts.prompt_ids[question],
                rollouts.completion_ids[question, rows, :length],
                args.temperature,
            )

    ref_logprobs = [None] * len(pieces)
    if reference is not None:
        with stopwatch("reference"), torch.no_grad():
            ref_logprobs = [logprobs_of(reference, *piece) for piece in pieces]

    epochs = []
    for _ in range(args.num_inner_epochs):
        with stopwatch("policy"):
            metrics = {"loss": torch.zeros((), device=weights.device)}
            for (question, rows, length), ref in zip(pieces, ref_logprobs):
                loss, sums = grpo_loss(
                    logprobs_of(policy, question, rows, length),
                    rollouts.logprobs[question, rows, :length],
                    ref,
                    advantages[question, rows],
                    weights[question, rows, :length],
                    args.clip_epsilon,
                    args.clip_epsilon_high,
                    args.kl_beta,
                    args.kl_estimator,
                )
                loss.backward()
                metrics["loss"] += loss.detach()
                for name, value in sums.items():
                    metrics[name] = metrics.get(name, 0) + value / trained_tokens
            metrics["grad_norm"], metrics["skipped"] = apply_gradients(
                optimizer, metrics["loss"], args.max_grad_norm
            )
        epochs.append({name: float(value) for name, value in metrics.items()})
    means = {name: fmean(epoch[name] for epoch in epochs) for name in epochs[0]}
    # Later epochs differ from the sampler because they have learnt, which is no mismatch.
    return {**means, "mismatch": epochs[0].get("mismatch", 0.0)}


def micro_batches(mask, learnable, size):
    """Cut the learnable groups into pieces (question, rows, longest completion among the rows).

    mask: (Q, G, C), learnable: (Q,), size: completions per piece, 0 for the whole group.
    """
    group_size = mask.shape[1]
    size = size or group_size
    lengths = mask.sum(-1).tolist()
    return [
        (question, slice(start, start + size), max(lengths[question][start : start + size]))
        for question, wanted in enumerate(learnable.tolist())
        for start in range(0, group_size if wanted else 0, size)
        if any(lengths[question][start : start + size])
    ]


def apply_gradients(optimizer, loss, max_grad_norm):
    """Clip, update and clear. Returns (gradient norm before clipping, 1 if the update was skipped).

    A loss or gradient that is not finite leaves weights and Adam's moments untouched.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf)
    finite = bool(torch.isfinite(grad_norm) & torch.isfinite(loss))
    if finite:
        optimizer.step()
    optimizer.zero_grad()
    return grad_norm, int(not finite)


def make_optimizer(policy, args):
    """AdamW with weight decay on matrices only, and its schedule, one step of it per GRPO step."""
    matrices = [p for p in policy.parameters() if p.ndim >= 2]
    vectors = [p for p in policy.parameters() if p.ndim < 2]  # norms and biases
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": args.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        fused=True,  # foreach would hold a second copy of the moments for an instant
    )
    warmup = math.ceil(args.warmup_percent * args.num_train_iters)

    def factor(step):
        if step < warmup:
            return (step + 1) / warmup
        if args.lr_schedule == "constant":
            return 1.0
        progress = (step - warmup) / max(1, args.num_train_iters - warmup)
        return 0.5 * (1 + math.cos(math.pi * progress))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def cold_start(policy, tokenizer, train_problems, args, accelerator):
    """Supervised steps on worked solutions, so that GRPO finds the answer format to reinforce.

    DeepSeek-R1 (2501.12948, section 2.3.1) starts the same way. Its batches are steps -N to -1 of
    the same stream of problems, mean loss per token, a fresh AdamW at a constant rate.
    """
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=args.cold_start_learning_rate, weight_decay=0.0, fused=True
    )
    steps = range(-args.cold_start_steps, 0)
    for step in tqdm(steps, desc="cold start", leave=False, disable=not steps):
        problems = train_problems.batch(step, args.questions_per_step)
        prompts = [chat_prompt(tokenizer, SYSTEM_PROMPT, p.question) for p in problems]
        targets = [worked_ids(tokenizer, problem) for problem in problems]
        # Padded on the right, behind everything that counts, so no mask is needed.
        rows = [
            torch.tensor(prompt + target, device=accelerator.device)
            for prompt, target in zip(prompts, targets)
        ]
        ids = pad_sequence(rows, batch_first=True)  # (Q, P + C)
        counts = torch.zeros_like(ids, dtype=torch.bool)
        for row, prompt, target in zip(counts, prompts, targets):
            row[len(prompt) : len(prompt) + len(target)] = True
        with accelerator.autocast():
            hidden = policy.get_decoder()(ids, use_cache=False).last_hidden_state
            # The hidden state that predicts a token is the one before it.
            loss = -token_logprobs(policy, hidden[:, :-1][counts[:, 1:]], ids[counts], 1.0).mean()
        loss.backward()
        apply_gradients(optimizer, loss.detach(), args.max_grad_norm)
        done = step + args.cold_start_steps + 1
        tqdm.write(f"cold start {done}/{args.cold_start_steps}: loss {loss.item():.3f}")


def worked_ids(tokenizer, problem):
    """The worked solution in the answer format, and the token that ends a turn."""
    ids = tokenizer(worked_answer(problem), add_special_tokens=False).input_ids
    return [*ids, tokenizer.eos_token_id]


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        train(ARGS)
    except UserError as error:
        print(f"main.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError:
        print("main.py: error: the GPU's memory is full; lower --micro_batch_size (training) or "
              "--eval_batch_size (evaluation)", file=sys.stderr)  # fmt: skip
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\nmain.py: interrupted; what was written is in {ARGS.output_dir}", file=sys.stderr)
        sys.exit(130)
