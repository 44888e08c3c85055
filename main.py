"""GRPO on one GPU: `python main.py` trains Qwen2.5-1.5B-Instruct on GSM8K.

In here: the training loop (`train`), what a step samples and trains on (`draw_groups`, `choose`)
and one update (`update_policy`). The rest of GRPO is one file each: sampling a group in sampler.py,
the rewards in evaluator.py, advantages and loss in grpo.py. Left out on purpose: a value network
(the group's mean is the baseline), reward models (rewards are functions), several GPUs, and any
trainer class to look behind.

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

from statistics import fmean

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm import tqdm

from budget import trained_counts
from cold_start import cold_start
from evaluator import REWARD_FUNCTIONS, evaluate, joined_rewards, score
from grpo import group_advantages, grpo_loss, has_signal, max_variance_subset, token_weights
from llms import chat_prompt, completion_logprobs, kl_reference, load_model, mix_into
from optimizer import apply_gradients, make_optimizer
from paged_sampler import sample_rollouts_paged
from planner import plan
from plotter import plot_run
from report import write_report
from rldatasets import SYSTEM_PROMPT, Problems, load_problems
from runlog import Run, show_progress, step_metrics, summary_table
from sampler import joined_rollouts, sample_rollouts
from shared_prefix import micro_batches
from token_log import watch_tokens


def train(args):
    """One run, from the loaded model to the saved one."""
    on_gpu = torch.cuda.is_available()
    accelerator = Accelerator(cpu=not on_gpu, mixed_precision="bf16" if on_gpu else "no")
    set_seed(args.seed)
    policy, tokenizer, train_problems, test_problems, facts = load(args, accelerator)
    run = Run(args.output_dir)
    run.save_config(args, str(accelerator.device), **facts)

    if args.gradient_checkpointing:
        policy.activation_checkpointing_enable()
        policy.train()  # checkpointing asks for it; nothing drops out, see shared_prefix.py
    cold_start(policy, tokenizer, train_problems, args, accelerator)
    reference = kl_reference(policy, args)
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
            problems, rollouts, rewards = draw_groups(
                policy, tokenizer, train_problems, step, run, args, accelerator, stopwatch
            )
            chosen = choose(rewards.total, args)  # (Q, G)
            advantages = group_advantages(rewards.total, args.advantage_scale, chosen)  # (Q, G)
            run.save_step(step, problems, rollouts, rewards, advantages)
            save_tokens = watch_tokens(
                run, step, policy, reference, tokenizer, rollouts, advantages, args, accelerator,
                stopwatch,
            )  # fmt: skip
            update = update_policy(
                policy, reference, optimizer, rollouts, advantages, args, accelerator, stopwatch,
                chosen,
            )  # fmt: skip
            save_tokens()
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
    write_report(run.path)
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


def draw_groups(policy, tokenizer, train_problems, step, run, args, accelerator, stopwatch):
    """The step's problems, rollouts and rewards.

    With --max_draws above 1, further questions are drawn until --questions_per_step groups carry
    signal, that is, until their completions earned unequal rewards (DAPO, arXiv 2503.14476, section
    3.2: dynamic sampling). Everything drawn is returned: `choose` says what is trained on.
    """
    problems, parts, scores = [], [], []
    for draw in range(step * args.max_draws, (step + 1) * args.max_draws):
        drawn = train_problems.batch(draw, args.questions_per_step)  # Q
        with stopwatch("sampling"):
            fresh = sample_groups(policy, tokenizer, drawn, draw, args, accelerator)
        with stopwatch("rewards"):
            problems += drawn
            parts.append(fresh)
            rollouts = joined_rollouts(parts)
            file = run.save_step(step, problems, rollouts)  # first, for what a reward may raise
            scores.append(score(fresh, drawn, REWARD_FUNCTIONS, args.reward_weights, file))
            rewards = joined_rewards(scores)
        if has_signal(rewards.total).sum() >= args.questions_per_step:
            break
    return problems, rollouts, rewards


def choose(rewards, args):
    """Which completions to train on, (Q, G), from their total rewards (Q, G)."""
    chosen = max_variance_subset(rewards, args.train_group_size or args.group_size)
    if args.max_draws > 1:
        signal = has_signal(rewards)  # (Q,)
        chosen &= (signal & (signal.cumsum(0) <= args.questions_per_step))[:, None]
    return chosen


def sample_groups(policy, tokenizer, problems, draw, args, accelerator):
    """G completions for each of these questions, from the policy as it is now."""
    generator = torch.Generator(accelerator.device).manual_seed(mixed_seed(args.seed, draw))
    prompts = [chat_prompt(tokenizer, SYSTEM_PROMPT, problem.question) for problem in problems]
    common = (policy, tokenizer, prompts, args.group_size, args.max_completion_length)
    with accelerator.autocast():
        if args.sampler == "paged":
            return sample_rollouts_paged(*common, args.temperature, generator)
        return sample_rollouts(
            *common, args.temperature, generator, args.top_k, args.top_p, args.min_p,
            args.compile_sampler,
        )  # fmt: skip


def update_policy(
    policy, reference, optimizer, rollouts, advantages, args, accelerator, stopwatch, chosen=None
):
    """One optimizer update per inner epoch on the step's completions. Returns metrics.

    advantages: (Q, G). chosen: (Q, G), the completions to train on, all by default.

    The loss is a weighted sum over tokens whose weights come from the whole step, so micro-batches
    simply add up (see grpo.token_weights). A group whose completions all earned the same has no
    advantage and, without a KL term, no gradient: it is left out. An update whose loss or gradient
    is not finite changes nothing.
    """
    chosen = torch.ones_like(advantages, dtype=torch.bool) if chosen is None else chosen
    chosen, advantages = (x.to(policy.device) for x in (chosen, advantages))
    mask = rollouts.completion_mask & chosen[:, :, None]  # (Q, G, C)
    if args.mask_truncated:
        mask = mask & rollouts.finished[:, :, None]
    sequences = chosen.sum().clamp(min=1)
    weights = token_weights(mask, args.aggregation, args.max_completion_length, sequences)
    learnable = (advantages != 0).any(-1, keepdim=True) | (reference is not None)  # (Q, 1)
    mask = mask & learnable[:, :, None]
    trained_tokens = mask.sum().clamp(min=1)
    lengths = mask.sum(-1).tolist()
    batches = micro_batches(rollouts.prompt_ids, lengths, args.micro_batch_tokens)
    old_logprobs, weights = rollouts.logprobs.flatten(0, 1), weights.flatten(0, 1)  # (B, C)
    ids, advantages = rollouts.completion_ids.flatten(0, 1), advantages.flatten()

    def logprobs_of(model, batch):
        with accelerator.autocast():
            return completion_logprobs(model, batch, ids[batch.rows], args.temperature)  # (R, C)

    ref_logprobs = None
    if reference is not None:
        with stopwatch("reference"), torch.no_grad():
            ref_logprobs = ids.new_zeros(ids.shape, dtype=policy.dtype)  # (B, C)
            # Nothing is kept for a backward pass, so larger ones fit, which read fewer prompts.
            for batch in micro_batches(rollouts.prompt_ids, lengths, 4 * args.micro_batch_tokens):
                ref_logprobs[batch.rows] = logprobs_of(reference, batch)

    epochs = []
    for _ in range(args.num_inner_epochs):
        with stopwatch("policy"):
            metrics = {"loss": torch.zeros((), device=policy.device)}
            for batch in batches:
                loss, sums = grpo_loss(
                    logprobs_of(policy, batch),
                    old_logprobs[batch.rows],
                    None if ref_logprobs is None else ref_logprobs[batch.rows],
                    advantages[batch.rows],
                    weights[batch.rows],
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
    means["mismatch"] = epochs[0].get("mismatch", 0.0)
    return means | trained_counts(batches, advantages.tolist(), reference is not None)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        plan(ARGS) if ARGS.plan else train(ARGS)
    except UserError as error:
        print(f"main.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError:
        print("main.py: error: the GPU's memory is full; lower --micro_batch_tokens (training), "
              "--eval_batch_size (evaluation) or --questions_per_step (sampling), or see --plan",
              file=sys.stderr)  # fmt: skip
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\nmain.py: interrupted; what was written is in {ARGS.output_dir}", file=sys.stderr)
        sys.exit(130)
