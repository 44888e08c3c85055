"""GRPO on one GPU: `python main.py` trains Qwen2.5-1.5B-Instruct on GSM8K.

In here: the training loop (`train`), what a step samples and trains on (`draw_groups`, `choose`)
and one update (`update_policy`). The rest of GRPO is one file each: sampling a group in sampler.py,
the rewards in evaluator.py, advantages and loss in grpo.py; what several GPUs share out is in
processes.py. Left out on purpose: a value network (the group's mean is the baseline), reward models
(rewards are functions), and any trainer class to look behind.

Q questions per step, G completions per question, P prompt tokens, C completion tokens; B = Q x G
completions of a step, R of them in a micro-batch.
"""

import sys
from functools import partial

from flags import parse_args
from interrupts import (
    Stopped,
    exit_on_signals,
    only_process_in,
    print_error,
    silence_all_but_main,
)
from utils import (
    Stopwatch,
    UserError,
    keep_freed_memory,
    mixed_seed,
    one_line,
    phase,
    release_freed_memory,
)

if __name__ == "__main__":  # before the imports below, which take seconds
    silence_all_but_main()
    exit_on_signals()
    ARGS = parse_args()
    keep_freed_memory()

from statistics import fmean

import torch
from accelerate.utils import set_seed
from tqdm import tqdm

from budget import trained_counts
from checkpoints import Saver, checkpoint_to_resume
from cold_start import cold_start
from evaluation import evaluate_policy
from evaluator import check_weights, joined_rewards, score, with_overlong_penalty
from grpo import group_advantages, grpo_loss, has_signal, max_variance_subset, token_weights
from llms import (
    chat_prompt,
    completion_logprobs,
    kl_reference,
    logprobs_without_gradient,
    mix_into,
)
from loading import load
from optimizer import apply_gradients, make_optimizer
from paged_sampler import sample_rollouts_paged
from planner import plan
from processes import (
    everyones,
    everyones_rollouts,
    from_main,
    is_lost_contact,
    make_accelerator,
    own_part,
    sum_gradients,
    summed,
)
from reward_lint import warn
from runlog import Run, show_progress, step_metrics, summary_table
from sampler import joined_rollouts, sample_rollouts
from sharding import own_batches, shard_if_configured, whole
from tasks import load_task
from token_log import watch_tokens
from trackers import finish_trackers, start_trackers
from weight_meter import WeightMeter


def train(args):
    """One run, from the loaded model, or where it stopped (--resume), to the last step's."""
    on_gpu = torch.cuda.is_available()
    accelerator = make_accelerator(log_with=args.track or None, project_dir=args.output_dir)
    set_seed(args.seed)
    task = load_task(args)
    check_weights(args.reward_weights, task.reward_functions)
    start = from_main(partial(checkpoint_to_resume, args), accelerator)  # None: from the beginning
    first = start.step if start else 0
    with phase("loading"), accelerator.main_process_first():
        policy, tokenizer, train_problems, test_problems, data = load(
            args, accelerator, task, start
        )
    warn(task, test_problems, args.reward_weights, args.reward_timeout)
    trackers = start_trackers(accelerator, args, first)
    run = Run(args.output_dir, trackers, writes=accelerator.is_main_process)
    run.cut_back(first)
    run.save_config(args, str(accelerator.device), **data)

    if args.gradient_checkpointing:
        policy.activation_checkpointing_enable()
        policy.train()  # checkpointing asks for it; nothing drops out, see shared_prefix.py
    shard_if_configured(policy, args, accelerator)
    if not start:
        with phase("cold start"):
            cold_start(policy, tokenizer, train_problems, args, accelerator, task)
    optimizer, scheduler = make_optimizer(policy, args, first)
    meter = WeightMeter(optimizer)
    reference = kl_reference(policy, args)  # last, for make_optimizer may round the weights
    saver = Saver(args, data, policy, tokenizer, reference, optimizer, start, accelerator)

    def evaluate_if_due(done):
        due = done == args.num_train_iters or is_due(done, args.eval_iterations)
        if done in run.evaluations or (run.evaluations and not due):
            return
        with phase("evaluation"):
            run.log_evaluation(done, *evaluate_policy(
                policy, tokenizer, test_problems, args, accelerator, task, done
            ))  # fmt: skip

    with saver, tqdm(total=args.num_train_iters, initial=first, desc="GRPO", unit="step") as bar:
        evaluate_if_due(first)
        for step in range(first, args.num_train_iters):
            stopwatch = Stopwatch(torch.cuda.synchronize if on_gpu else None)
            problems, rollouts, rewards = draw_groups(
                policy, tokenizer, train_problems, step, run, args, accelerator, stopwatch, task
            )
            chosen = choose(rewards.total, args)  # (Q, G)
            advantages = group_advantages(
                rewards.total, args.advantage_scale, chosen, args.baseline
            )  # (Q, G)
            run.save_step(step, problems, rollouts, rewards, advantages)
            if args.save_rollouts:
                run.save_rollouts(step, rollouts, rewards, advantages, chosen)
            save_tokens = watch_tokens(
                run, step, policy, reference, tokenizer, rollouts, advantages, args, accelerator,
                stopwatch,
            )  # fmt: skip
            update = update_policy(
                policy, reference, optimizer, rollouts, advantages, args, accelerator, stopwatch,
                chosen,
            )  # fmt: skip
            saver.hold()  # until the step is complete, see Saver
            save_tokens()
            update |= meter.shares()
            update["learning_rate"] = scheduler.get_last_lr()[0]
            scheduler.step()
            done = step + 1
            if args.update_ref_model and is_due(done, args.update_ref_model_freq):
                mix_into(reference, policy, args.ref_model_mixup_alpha)
            metrics = step_metrics(step, rollouts, rewards, update, stopwatch.seconds)
            run.log_step(metrics)
            saver.completed(done, metrics["skipped"])
            evaluate_if_due(done)
            if is_due(done, args.save_steps):
                saver.save()
                run.draw(done)
            sample = rollouts.texts[0][0] if args.verbose else None
            show_progress(bar, metrics, run.last_evaluation, sample)
        saver.publish()
        run.draw(args.num_train_iters, with_report=True)
        finish_trackers(trackers)
    print(summary_table(run.path, run.first_evaluation, run.last_evaluation))
    accelerator.state.destroy_process_group()


def is_due(done, every):
    return every > 0 and done % every == 0


def draw_groups(policy, tokenizer, train_problems, step, run, args, accelerator, stopwatch, task):
    """The step's problems, rollouts and rewards.

    With --max_draws above 1, further questions are drawn until --questions_per_step groups carry
    signal, that is, until their completions earned unequal rewards (DAPO, arXiv 2503.14476, section
    3.2: dynamic sampling). Everything drawn is returned: `choose` says what is trained on.
    """
    problems, parts, scores = [], [], []
    for draw in range(step * args.max_draws, (step + 1) * args.max_draws):
        drawn = train_problems.batch(draw, args.questions_per_step)  # Q
        own = own_part(drawn, accelerator)
        seeds = own_part([mixed_seed(args.seed, draw, q) for q in range(len(drawn))], accelerator)
        with stopwatch("sampling"):
            sampled = sample_groups(policy, tokenizer, own, seeds, args, accelerator, task)
            parts += everyones_rollouts(sampled, accelerator)
        with stopwatch("rewards"):
            problems += drawn
            rollouts = joined_rollouts(parts)
            file = run.save_step(step, problems, rollouts)  # first, for what a reward may raise
            earned = score(
                sampled, own, task.reward_functions, args.reward_weights, file, args.reward_timeout
            )
            scores += everyones(with_overlong_penalty(earned, sampled, args), accelerator)
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


def sample_groups(policy, tokenizer, problems, seeds, args, accelerator, task):
    """G completions for each of these problems, from the policy as it is now; `seeds`, a number per
    problem, fix the draws."""
    prompts = [chat_prompt(tokenizer, task.system_prompt, problem.question) for problem in problems]
    at_once = args.sampling_batch_size // args.group_size or len(prompts)  # questions
    if args.compile_sampler:  # batches of one size, for another would be compiled anew
        at_once = max(n for n in range(1, at_once + 1) if len(prompts) % n == 0)
    parts = []
    with accelerator.autocast(), whole(policy):
        for start in range(0, len(prompts), at_once):
            now = slice(start, start + at_once)
            common = (
                policy, tokenizer, prompts[now], args.group_size, args.max_completion_length,
                args.temperature, seeds[now],
            )  # fmt: skip
            if args.sampler == "paged":
                parts.append(sample_rollouts_paged(*common))
            else:
                filters = (args.top_k, args.top_p, args.min_p)
                parts.append(sample_rollouts(*common, *filters, args.compile_sampler))
    release_freed_memory(accelerator.device)
    return joined_rollouts(parts)


def update_policy(
    policy, reference, optimizer, rollouts, advantages, args, accelerator, stopwatch, chosen=None
):
    """One optimizer update per inner epoch on the step's completions. Returns metrics.

    advantages: (Q, G). chosen: (Q, G), the completions to train on, all by default.

    The loss is a weighted sum over tokens whose weights come from the whole step, so micro-batches
    simply add up (see grpo.token_weights). A group whose completions all earned the same has no
    advantage and, without a KL term or entropy bonus, no gradient: it is left out. An update whose
    loss or gradient is not finite changes nothing.
    """
    chosen = torch.ones_like(advantages, dtype=torch.bool) if chosen is None else chosen
    chosen, advantages = (x.to(policy.device) for x in (chosen, advantages))
    mask = rollouts.completion_mask & chosen[:, :, None]  # (Q, G, C)
    if args.mask_truncated:
        mask = mask & rollouts.finished[:, :, None]
    sequences = chosen.sum().clamp(min=1)
    weights = token_weights(mask, args.aggregation, args.max_completion_length, sequences)
    learnable = (advantages != 0).any(-1, keepdim=True)  # (Q, 1)
    if reference is None and args.entropy_bonus == 0:
        mask = mask & learnable[:, :, None]
    trained_tokens = mask.sum().clamp(min=1)
    lengths = mask.sum(-1).tolist()
    own, lengths, batches, idle = own_batches(
        policy, rollouts.prompt_ids, lengths, args.micro_batch_tokens, accelerator
    )
    # `own` groups are this process's; the others have weight 0 here. `idle` batches have it too:
    # where weights are cut up (FSDP2), all processes go through the model equally often.
    weights = weights * weights.new_tensor(own)[:, None, None]
    old_logprobs, weights = rollouts.logprobs.flatten(0, 1), weights.flatten(0, 1)  # (B, C)
    ids, advantages = rollouts.completion_ids.flatten(0, 1), advantages.flatten()

    def logprobs_of(batch, **more):
        with accelerator.autocast():
            return completion_logprobs(policy, batch, ids[batch.rows], args.temperature, **more)

    ref_logprobs = None
    if reference is not None:
        with stopwatch("reference"), accelerator.autocast():
            ref_logprobs = logprobs_without_gradient(
                reference, rollouts.prompt_ids, lengths, ids, args.temperature,
                args.micro_batch_tokens,
            )  # (B, C)  # fmt: skip
        release_freed_memory(policy.device)

    epochs, first_logprobs = [], torch.zeros_like(ids, dtype=policy.dtype)  # (B, C)
    for _ in range(args.num_inner_epochs):
        with stopwatch("policy"):
            metrics = {"loss": torch.zeros((), device=policy.device)}
            for batch in batches + idle:
                entropy = None
                if args.entropy_bonus > 0:
                    logprobs, entropy = logprobs_of(batch, with_entropy=True)  # (R, C)
                else:
                    logprobs = logprobs_of(batch)  # (R, C)
                if not epochs:
                    first_logprobs[batch.rows] = logprobs.detach()
                loss, sums = grpo_loss(
                    logprobs,
                    old_logprobs[batch.rows],
                    None if ref_logprobs is None else ref_logprobs[batch.rows],
                    advantages[batch.rows],
                    weights[batch.rows],
                    clip_epsilon_low=args.clip_epsilon,
                    clip_epsilon_high=args.clip_epsilon_high,
                    kl_beta=args.kl_beta,
                    kl_estimator=args.kl_estimator,
                    ratio=args.ratio,
                    clip=args.clip,
                    tis_cap=args.tis_cap,
                    first_logprobs=first_logprobs[batch.rows],
                    entropy_bonus=args.entropy_bonus,
                    entropy=entropy,
                )
                loss.backward()
                metrics["loss"] += loss.detach()
                for name, value in sums.items():
                    metrics[name] = metrics.get(name, 0) + value / trained_tokens
            metrics = summed(metrics, accelerator)
            sum_gradients(optimizer, accelerator)
            metrics["grad_norm"], metrics["skipped"] = apply_gradients(
                optimizer, metrics["loss"], args.max_grad_norm
            )
        epochs.append({name: float(value) for name, value in metrics.items()})
    means = {name: fmean(epoch[name] for epoch in epochs) for name in epochs[0]}
    # Later epochs differ from the sampler because they have learnt, which is no mismatch.
    means["mismatch"] = epochs[0].get("mismatch", 0.0)
    with_kl = reference is not None or args.entropy_bonus > 0
    counts = summed(trained_counts(batches, advantages.tolist(), with_kl), accelerator)
    return means | {name: int(count) for name, count in counts.items()}


def command(args):
    """What `python main.py` does with its flags. Returns the exit status."""
    try:
        if args.plan:
            plan(args)
        else:
            with only_process_in(args.output_dir):
                train(args)
    except UserError as error:
        print_error(one_line(f"main.py: error: {error}"))
        return 2
    except Stopped as stop:
        print(f"main.py: interrupted by {stop}; to go on: --resume --output_dir {args.output_dir}",
              file=sys.stderr)  # fmt: skip
        return 128 + stop.number
    except RuntimeError as error:
        if not is_lost_contact(error):
            raise
        print("main.py: error: another process of this run has ended", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(command(ARGS))
