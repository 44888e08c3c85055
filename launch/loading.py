"""What a run begins with: problems, model, directory, and whatever is wrong with them."""

import hashlib
import json
import os
import sys
from dataclasses import dataclass, replace
from functools import partial

import torch
from accelerate.utils import set_seed
from tqdm import tqdm

from evaluation.comparison import evaluation_table
from evaluation.games import played
from evaluation.held_out import check_room, evaluate_policy
from evaluation.reward_lint import warn, why_not_golden
from evaluation.sources import sources_of
from evaluator import is_correct, parse_number
from llms import prompt_of
from records.checkpoints import checkpoint_to_resume
from records.exports import write_for_others
from records.resuming import saved_config, steps_with_other_rewards
from records.run import Run
from records.trackers import start_trackers
from rldatasets import (
    Problems,
    fingerprint,
    repeats,
    some_of,
    whole_blocks,
    without_overlap,
)
from sampling.engine import start_engine
from sampling.probe import load_policy
from tasks import check_weights, load_task
from training.lean_layers import recompute_layers
from training.lora import add_adapter
from training.precision import loss_scale_of, resolved
from training.processes import from_main, make_accelerator, patient
from training.progress import Stopwatch, phase, progress
from training.setup import Setup
from training.sharding import shard_if_configured
from utils import UserError, named


@dataclass(frozen=True)
class Data:
    """What a run learns from and is judged by."""

    train: Problems
    test: Problems
    facts: dict  # counts and fingerprint; a resumed run must find those that it knew again


def begin(args):
    """(Setup without a reference, Run, Data, the Checkpoint to go on from or None).

    Raises UserError, before anything is written, for whatever only the files themselves can tell.
    """
    args.precision = resolved(args.precision)  # what config.json says, and --resume keeps
    accelerator = make_accelerator(
        args.precision, log_with=args.track or None, project_dir=args.output_dir
    )
    set_seed(args.seed)
    task = load_task(args)
    check_game(task, args, accelerator)
    start_judge(task, args)
    check_weights(args.reward_weights, task.reward_functions, args.overlong_buffer)
    with patient(accelerator):  # a checkpoint's files are read whole
        start = from_main(partial(checkpoint_to_resume, args), accelerator)  # None: a new run
    first = start.step if start else 0
    with phase("loading"), patient(accelerator), accelerator.main_process_first():
        policy, tokenizer, data = load(args, accelerator, task, start)
    with phase("lint"):
        if not task.game:  # whose rewards are no functions of a completion
            warn(task, data.test, args.reward_weights, args.reward_timeout)
    for line in remarks(task, data.test):
        tqdm.write(line)
    saved = saved_config(args.output_dir) if start else {}
    sources = sources_of(task)
    changed_at = steps_with_other_rewards(saved, sources, first, args.allow_changed_rewards)
    if first in changed_at:
        tqdm.write("main.py: warning: the rewards are others from here on", file=sys.stderr)
    trackers = start_trackers(accelerator, args, first)
    run = Run(args.output_dir, trackers, writes=accelerator.is_main_process)
    run.cut_back(first)
    facts = {**data.facts, **sources, "rewards_changed_at": changed_at}
    run.save_config(args, str(accelerator.device), saved, first, **facts)
    run.save_thumbnails(data.test)
    engine = start_engine(policy, args, accelerator, write_for_others)
    if args.gradient_checkpointing:
        recompute_layers(policy)
    shard_if_configured(policy, args, accelerator)
    stopwatch = Stopwatch(torch.cuda.synchronize if torch.cuda.is_available() else None)
    setup = Setup(policy, tokenizer, task, args, accelerator, None, stopwatch, engine=engine)
    return replace(setup, loss_scale=loss_scale_of(args.precision)), run, data, start


def check_game(task, args, accelerator):
    """Raise UserError where games cannot be played by processes as accelerate's configuration has
    them."""
    if task.game and accelerator.is_fsdp2:
        raise UserError(f"--dataset_name {args.dataset_name}: processes play games of their own, "
                        "for which FSDP2 has no whole policy; use 8x80gb_ddp.yaml")  # fmt: skip


def start_judge(task, args):
    """Have the processes of the task's verifier, if it has one, ready before they are asked."""
    if task.judge is not None:
        try:
            task.judge.start(args.reward_workers)
        except RuntimeError as error:
            raise UserError(f"--dataset_name {args.dataset_name}: {error}; the lines above say "
                            "why") from None  # fmt: skip
    elif args.reward_workers > 1:
        print(f"main.py: warning: --reward_workers {args.reward_workers} does nothing: the rewards "
              "ask no other process", file=sys.stderr)  # fmt: skip


def load(args, accelerator, task, start=None):
    """Data, then model: (policy, tokenizer, Data)."""
    train_problems, test_problems, counts = read_problems(args, task, start)
    check_data(args, train_problems, test_problems, accelerator.num_processes)
    if args.questions_per_step % (task.together * accelerator.num_processes):
        raise UserError(f"{named(args, 'questions_per_step')}: the task has {task.together} that "
                        "belong together, in each process; make it a multiple")  # fmt: skip
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # else only one process has the weights
    tqdm.write(f"loading {args.model_name} ...")
    policy, tokenizer = load_policy(args, accelerator)
    add_adapter(policy, args)

    def prompt_length(problem):
        return len(prompt_of(tokenizer, task, problem))

    fitting = [p for p in train_problems if prompt_length(p) <= args.max_prompt_length]
    fitting = whole_blocks(train_problems, fitting, task.together)
    left_out = len(train_problems) - len(fitting)
    if left_out:
        tqdm.write(f"{left_out} of {len(train_problems)} training questions left out: their "
                   "prompts are longer than --max_prompt_length "
                   f"{args.max_prompt_length}")  # fmt: skip
    if not fitting:
        raise UserError(f"{named(args, 'max_prompt_length')}: no training prompt is that short; "
                        "raise it")  # fmt: skip
    check_room(policy, tokenizer, test_problems, args, task)
    facts = {
        "train_problems": len(fitting),
        "left_out": left_out,
        "test_problems": len(test_problems),
        "problems_sha256": fingerprint([*fitting, *test_problems]),
        "prompts_sha256": prompts_sha256(tokenizer, test_problems, task),
        **counts,
    }
    check_same_data(facts, start)
    train = Problems(fitting, args.seed, together=task.together)
    return policy, tokenizer, Data(train, test_problems, facts)


def remarks(task, problems):
    """What is worth knowing of how a run is judged and its rewards are checked, a line each."""
    if reason := why_not_golden(task, problems):
        yield f"rewards are not linted: {reason}, unlike the lint's golden completions"
    latex = [p.answer for p in problems if "\\" in p.answer and parse_number(p.answer) is None]
    if latex and task.is_correct is is_correct:
        yield (f"{len(latex)} of {len(problems)} gold answers are LaTeX, such as {latex[0]:.40}, "
               "compared as text; --dataset_name math (for data on the hub, --evaluator "
               "tasks/math.py) judges what they mean")  # fmt: skip
    own = not any(function.__module__ == "evaluator" for function in task.reward_functions)
    if own and task.is_correct is is_correct:
        yield ("accuracy counts what stands in <answer> tags and equals the gold answer, whatever "
               "your rewards pay for; to count otherwise: an is_correct beside them")  # fmt: skip


def check_data(args, train_problems, test_problems, processes):
    """Raise UserError where the flags ask for what the data does not have. A cold start that nobody
    asked for is none then."""
    if args.cold_start_steps and not all(problem.solution for problem in train_problems):
        if "cold_start_steps" in args.typed:
            raise UserError(f"--cold_start_steps {args.cold_start_steps}: the data has no worked "
                            "solutions (field `solution`); set it to 0")  # fmt: skip
        tqdm.write("no cold start: the data has no worked solutions (field `solution`), so "
                   f"--cold_start_steps is 0, not {args.cold_start_steps} as in --preset "
                   f"{args.preset}")  # fmt: skip
        args.cold_start_steps = 0
    if args.save_rollouts and any(problem.images for problem in train_problems):
        raise UserError("--save_rollouts: its files hold no pictures, and the data has some; leave "
                        "it out")  # fmt: skip
    held_out = f"{len(test_problems)} held-out problems"
    if len(test_problems) == args.eval_problems:
        held_out = named(args, "eval_problems")
    counts = {named(args, "questions_per_step"): args.questions_per_step,
              held_out: len(test_problems)}  # fmt: skip
    for culprit, count in counts.items():
        if count < processes:
            raise UserError(f"{culprit}: less than one for each of {processes} processes; raise "
                            "it, or start fewer")  # fmt: skip


def read_problems(args, task, start=None):
    """(training problems, held-out problems, counts): no question of the test split is trained on,
    however it is written, and those that stand in one split twice are counted.

    Raises UserError where nothing is left to train on.
    """
    train, test = (task.problems(split) for split in ("train", "test"))
    for line in what_was_taken(train, test):
        tqdm.write(line)
    kept = whole_blocks(train, without_overlap(train, test), task.together)
    if task.game:  # it has few positions, and what an evaluation asks of them is never rewarded
        kept = list(train)
    overlap = len(train) - len(kept)
    if not kept:
        name = "dataset_path" if args.dataset_path else "dataset_name"
        raise UserError(f"--{name} {getattr(args, name)}: all {overlap} training questions are in "
                        "the test split too; name data with others")  # fmt: skip
    if overlap:
        tqdm.write(f"{overlap} of {len(train)} training questions left out: they are in the test "
                   "split too")  # fmt: skip
    held_out = held_out_problems(args, test, start, task.together)
    counts = {"overlap": overlap, "train_repeats": repeats(kept), "test_repeats": repeats(held_out)}
    return kept, held_out, counts


def what_was_taken(*splits):
    """What the splits were taken from and is not plain, a line each; once where it is the same."""
    taken = {split.columns: split.taken for split in reversed(splits)}
    lines = [taken[columns] for columns in dict.fromkeys(split.columns for split in splits)]
    remarks = [remark for split in splits for remark in split.remarks]
    return [line for line in dict.fromkeys([*lines, *remarks]) if line]


def held_out_problems(args, test, start=None, together=1):
    """The problems of the test split that --eval_problems asks for; those that ask the same as
    another are told.

    The first ones where problems are made in random order, and in a run begun before there was a
    shuffle.
    """
    in_order = args.dataset_name == "arithmetic" or (start and "overlap" not in start.data)
    chosen = some_of(test, args.eval_problems, in_order, together)
    if count := repeats(chosen):
        print(f"main.py: warning: {count} of {len(chosen)} held-out questions stand there before; "
              "intervals and p-values take them for further ones", file=sys.stderr)  # fmt: skip
    return chosen


def prompts_sha256(tokenizer, problems, task):
    """A checksum of the first of these problems as prompts, in token ids: it changes with the chat
    template, its arguments, the date in it, the system prompt and the tokenizer."""
    prompts = [prompt_of(tokenizer, task, problem) for problem in problems[:16]]
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()


def check_same_data(facts, start):
    """Raise UserError where a Checkpoint, if any, is of other problems or prompts than these facts
    are. What it does not say, as runs of before did not, is not compared."""
    said = start.data if start else {}
    differing = {name for name, value in facts.items() if said.get(name, value) != value}
    if differing == {"prompts_sha256"}:
        raise UserError(f"--resume: {start.path} was trained with other prompts than these; chat "
                        "template, system prompt and tokenizer must be as they were")  # fmt: skip
    if differing:
        raise UserError(f"--resume: {start.path} was trained on other problems than these")


def evaluate_and_save(args):
    """Evaluate one model and write what an evaluation in training writes, as step 0 of a run."""
    accelerator = make_accelerator()
    task = load_task(args)
    start_judge(task, args)
    test = task.problems("test")
    for line in what_was_taken(test):
        tqdm.write(line)
    problems = held_out_problems(args, test, together=task.together)
    policy, tokenizer = load_policy(args, accelerator)
    check_room(policy, tokenizer, problems, args, task)
    run = Run(args.output_dir)
    facts = {"test_problems": len(problems), **sources_of(task)}
    run.save_config(args, str(accelerator.device), **facts)
    run.save_thumbnails(problems)
    with progress, phase("evaluation"):
        setup = Setup(policy, tokenizer, task, args, accelerator)
        summary, records = evaluate_policy(setup, problems, step=0)
        summary, games = played(setup, summary)
    run.log_evaluation(0, summary, records, games)
    print("\n".join([*evaluation_table({args.model_name: summary}), f"It is in {run.path}."]))
