"""GRPO on one GPU: `python main.py` trains Qwen2.5-1.5B-Instruct on GSM8K.

In here: the training loop (`train`), what a step samples (`draw_groups`) and what it trains on
(`choose`). The rest of GRPO is a file each: a group sampled in sampling/groups.py, rewards in
evaluator.py, advantages and loss in grpo.py, one update in training/update.py; what several GPUs
share out is in training/processes.py. Left out on purpose: a value network (the group's mean is the
baseline), reward models (rewards are functions), and any trainer class to look behind.

Q questions per step, G completions per question.
"""

# Carries out all other commands, and answers typos before torch is in.
from launch.door import ARGS, enter

import sys
from dataclasses import replace

from evaluation.comparison import summarize
from evaluation.games import played
from evaluation.held_out import an_eighth, evaluate_policy
from evaluation.referees import with_referees
from evaluation.scoring import (
    advantages_of,
    joined_rewards,
    judged_ahead,
    score,
    with_another,
    with_overlong_penalty,
)
from evaluation.win_rate import against_start
from grpo import has_signal, max_variance_subset
from launch.interrupts import only_process_in, print_error, stopped_line
from launch.loading import begin
from llms import chat_prompt, kl_reference, mix_into
from records.budget import say_how_long
from records.checkpoints import Saver
from records.run import show_progress, step_metrics, summary_table
from records.trackers import finish_trackers
from sampling.groups import sample_groups
from sampling.rollouts import joined_rollouts, without_thoughts
from sampling.self_play import played_on, positions
from sampling.turns import worked_ids
from training.cold_start import cold_start
from training.optimizer import make_optimizer
from training.processes import everyones, everyones_rollouts, lost_contact, own_part
from training.progress import phase, progress
from training.token_log import watch_tokens
from training.update import update_policy
from training.weight_meter import WeightMeter
from utils import Stopped, UserError, mixed_seed, one_line
from vision.sight import pictures_of


def train(args):
    """One run, from the loaded model, or where it stopped (--resume), to the last step's."""
    setup, run, data, start = begin(args)
    first = start.step if start else 0
    if not start:
        looks = args.short_eval_iterations and args.cold_start_steps
        if looks and not run.short_evaluations:  # of a start that came to no checkpoint
            evaluate_shortly(setup, run, data.test, 0, before_cold_start=True)
        with phase("cold start"):
            cold_start(setup, data.train, chat_prompt, worked_ids, pictures_of)
    optimizer, scheduler = make_optimizer(setup.policy, args, first)
    meter = WeightMeter(optimizer)
    # Last, for make_optimizer may round the weights.
    setup = with_referees(replace(setup, reference=kl_reference(setup.policy, args)), run.path)
    saver = Saver(setup, optimizer, data.facts, start)

    def evaluate_if_due(done):
        due = done == args.num_train_iters or is_due(done, args.eval_iterations)
        if done not in run.evaluations and (due or not run.evaluations):
            with phase("evaluation"):
                answered = evaluate_policy(setup, data.test, done)
                summary, records = against_start(setup, run.first_records, *answered)
                summary, games = played(setup, summary)
            run.log_evaluation(done, summary, records, games)
            if args.short_eval_iterations:
                run.log_short_evaluation(done, summarize(an_eighth(records)))
        elif is_due(done, args.short_eval_iterations) and done not in run.short_evaluations:
            evaluate_shortly(setup, run, data.test, done)

    with progress.open(total=args.num_train_iters, initial=first, unit="step") as bar, saver:
        evaluate_if_due(first)
        say_how_long(args, first)
        for step in range(first, args.num_train_iters):
            problems, rollouts, rewards = draw_groups(setup, data.train, step, run)
            chosen = choose(rewards.total, args)  # (Q, G)
            advantages = advantages_of(rewards, args, chosen)  # (Q, G)
            run.save_step(step, problems, rollouts, rewards, advantages)
            if args.save_rollouts:
                run.save_rollouts(step, rollouts, rewards, advantages, chosen)
            watched = watch_tokens(setup, step, rollouts, advantages)
            update = update_policy(setup, optimizer, rollouts, advantages, chosen)
            saver.hold()  # until the step is complete, see Saver
            run.save_tokens(step, problems, watched())
            update |= meter.shares() | {"learning_rate": scheduler.get_last_lr()[0]}
            scheduler.step()
            done = step + 1
            if args.update_ref_model and is_due(done, args.update_ref_model_freq):
                mix_into(setup.reference, setup.policy, args.ref_model_mixup_alpha)
            metrics = step_metrics(step, rollouts, rewards, update, setup)
            run.log_step(metrics)
            saver.completed(done, metrics["skipped"])
            evaluate_if_due(done)
            if is_due(done, args.save_steps):
                with run.drawn_meanwhile(done):
                    saver.save()
            sample = rollouts.texts[0][0] if args.verbose else None
            show_progress(bar, metrics, run.last_evaluation, sample)
        with run.drawn_meanwhile(args.num_train_iters, with_report=True):
            saver.publish()
        finish_trackers(run.trackers)
    print(summary_table(run.path, run.first_evaluation, run.last_evaluation))
    setup.accelerator.state.destroy_process_group()


def is_due(done, every):
    return every > 0 and done % every == 0


def evaluate_shortly(setup, run, problems, done, **more):
    """Where the policy stands, on an eighth of the held-out problems: a curve between the
    evaluations that decide."""
    with phase("short evaluation"):
        summary, _ = evaluate_policy(setup, an_eighth(problems), done)
    run.log_short_evaluation(done, summary | more)


def draw_groups(setup, train_problems, step, run):
    """The step's problems, rollouts and rewards.

    With --max_draws above 1, further questions are drawn until --questions_per_step groups carry
    signal, that is, until their completions earned unequal rewards (DAPO, arXiv 2503.14476, section
    3.2: dynamic sampling). Everything drawn is returned: `choose` says what is trained on.
    """
    args, task, accelerator = setup.args, setup.task, setup.accelerator
    problems, parts, scores = [], [], []
    for draw in range(step * args.max_draws, (step + 1) * args.max_draws):
        if task.game:
            drawn = positions(setup, draw)  # Q
        else:
            drawn = train_problems.batch(draw, args.questions_per_step)  # Q
        own = own_part(drawn, accelerator)
        seeds = own_part([mixed_seed(args.seed, draw, q) for q in range(len(drawn))], accelerator)
        with setup.stopwatch("sampling"):
            sampled = sample_groups(setup, own, seeds)
            parts += everyones_rollouts(sampled, accelerator)
        if task.game:
            outcomes = played_on(setup, own, sampled, seeds)  # (Q, G)
        with setup.stopwatch("rewards"):
            problems += drawn
            rollouts = joined_rollouts(parts)
            file = run.save_step(step, problems, rollouts)  # first, for what a reward may raise
            judged = without_thoughts(sampled, setup)
            judged_ahead(judged, own, setup, task.reward_functions)
            earned = score(
                judged, own, task.reward_functions, args.reward_weights, file, args.reward_timeout
            )
            if task.game:
                earned = with_another(earned, "outcome", outcomes)
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


def command(args):
    """Train, and say in a line what went wrong. Returns the exit status."""
    try:
        with only_process_in(args.output_dir), progress:
            train(args)
    except UserError as error:
        print_error(one_line(f"main.py: error: {error}"))
        return 2
    except Stopped as stop:
        print(stopped_line(stop, args.output_dir), file=sys.stderr)
        return 128 + stop.number
    except RuntimeError as error:
        if not (lost := lost_contact(error)):
            raise
        print(f"main.py: error: another process of this run {lost}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    # Under a profiler, which is the program then, the door does not know that main.py is running.
    sys.exit(command(ARGS or enter(sys.argv[1:])))
