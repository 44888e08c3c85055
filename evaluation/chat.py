"""A model tried by hand: an answer while it is written, and one group with its advantages.

Questions are put to it as in training: one after the system prompt, with no turn before it, and the
answer sampled as in training. What a model wrote may hold what a terminal obeys: it is printed as
text, see utils.printable.
"""

import shutil
import textwrap
from contextlib import suppress

from transformers import TextStreamer

from evaluation.held_out import check_room, verdicts
from evaluation.referees import with_referees
from evaluation.scoring import advantages_of, score, with_another
from evaluator import sees_group
from llms import prompt_of
from reading.images import image_file
from rldatasets import Problem
from sampling.groups import filters_of, sample_rollouts
from sampling.probe import load_policy
from sampling.rollouts import without_thoughts
from sampling.self_play import played_on
from sampling.turns import replies
from tasks import check_weights, load_task
from training.processes import make_accelerator
from training.progress import phase
from training.setup import Setup
from utils import UserError, one_line, printable
from vision.sight import pictures_of

NO_ANSWER = "(no gold answer)"  # as a gold answer, what no completion is equal to
NEEDS_ONE = "none given; correctness is 0 without one (--answer, or --question N)"
WIDEST = 100  # characters
FIRST_LINES, LAST_LINES = 2, 4  # of a completion that is shown in short; the answer is at its end


class Printer(TextStreamer):
    """Prints tokens as they come, word by word."""

    def on_finalized_text(self, text, stream_end=False):
        print(printable(text, kept="\n"), end="\n" if stream_end else "", flush=True)


def load(args, task):
    """The Setup that a run with these flags would have."""
    accelerator = make_accelerator()
    policy, tokenizer = load_policy(args, accelerator)
    return Setup(policy, tokenizer, task, args, accelerator)


def asked_task(args):
    """The Task that the command line names. Raises UserError, also for --reward_weights."""
    task = load_task(args)
    check_weights(args.reward_weights, task.reward_functions)
    return task


def asked_problem(args, task):
    """The Problem that the command line asks: its own text, or one of a dataset."""
    if args.question is None:
        if task.game:
            raise UserError(f"--dataset_name {args.dataset_name}: a text is no position of its "
                            "game; name one by --question N")  # fmt: skip
        images = tuple(image_file(name, "--image") for name in args.image)
        return Problem(args.ask, NO_ANSWER if args.answer is None else args.answer, "", {}, images)
    problems = task.problems(args.split)
    if args.question >= len(problems):
        raise UserError(f"--question {args.question}: the {args.split} split has "
                        f"{len(problems)} questions, counted from 0")  # fmt: skip
    return problems[args.question]


def sample_group(setup, problem, group_size, watch=None):
    """The Rollouts (1, G, C) of one question; they depend on --seed alone."""
    model, tokenizer, args, task = setup.policy, setup.tokenizer, setup.args, setup.task
    check_room(model, tokenizer, [problem], args, task)
    prompt = prompt_of(tokenizer, task, problem)
    with phase("answering"), setup.accelerator.autocast():
        pictures = pictures_of(model, tokenizer, [prompt], [problem])
        return sample_rollouts(
            model, tokenizer, [prompt], group_size, args.max_completion_length, args.temperature,
            [args.seed], filters_of(args), stop=args.stop, watch=watch,
            reply=replies(setup, [problem]), pictures=pictures,
        )  # fmt: skip


def score_group(rollouts, problem, args, task):
    alone = len(rollouts.texts[0]) == 1  # and nothing to compare with
    functions = [f for f in task.reward_functions if not (alone and sees_group(f))]
    return score(rollouts, [problem], functions, args.reward_weights, timeout=args.reward_timeout)


def chat(args):
    """Answer one question and judge the answer, or answer questions until there are no more."""
    task = asked_task(args)
    if args.ask is not None or args.question is not None:
        problem = asked_problem(args, task)
        setup = load(args, task)
        print(f"{printable(problem.question, kept=chr(10))}\n")
        rollouts = stream(setup, problem)
        rollouts = without_thoughts(rollouts, setup)
        print("\n".join(["", *judged(rollouts, problem, args, task)]), flush=True)
        return
    setup = load(args, task)
    print("One question at a time, none knows of those before it. Ctrl-D ends.")
    with suppress(ImportError):
        import readline  # noqa: F401  input() then has a line to edit, and a history
    while True:
        try:
            question = input("\n> ").strip()
        except EOFError:
            print()
            return
        try:
            if question:
                stream(setup, Problem(question, NO_ANSWER, ""))
        except UserError as error:  # too long a question, say
            print(one_line(str(error)))


def stream(setup, problem):
    """Print an answer while it is sampled. Returns its Rollouts (1, 1, C)."""
    printer = Printer(setup.tokenizer, skip_special_tokens=True)
    rollouts = sample_group(setup, problem, 1, printer.put)
    printer.end()
    return rollouts


def judged(rollouts, problem, args, task):
    """Lines that say what an answer is worth."""
    [[text]], rewards = rollouts.texts, score_group(rollouts, problem, args, task)
    verdict, known = verdicts(text, problem, task, args.reward_timeout), problem.answer != NO_ANSWER
    parsed = "none: no one pair of answer tags" if verdict["parsed"] is None else verdict["parsed"]
    rows = {
        "parsed answer": parsed,
        "gold answer": problem.answer if known else NEEDS_ONE,
        "right": ("yes" if verdict["correct"] else "no") if known else "?",
        "length": length(rollouts, 0),
        **{name: f"{value:.4g}" for name, value in zip(rewards.names, scores(rewards, 0))},
        "total reward": f"{rewards.total.item():.4g}",
    }
    width = max(map(len, rows))
    return [one_line(f"{name:{width}}  {value}", WIDEST) for name, value in rows.items()]


def length(rollouts, g):
    cut_off = "" if rollouts.finished[0, g] else ", cut off"
    return f"{int(rollouts.completion_mask[0, g].sum())} tokens{cut_off}"


def scores(rewards, g):
    return rewards.per_function[0, g].tolist()


def show_group(args):
    """Sample one group and print each completion with its rewards and its advantage."""
    task = asked_task(args)
    problem = asked_problem(args, task)
    setup = with_referees(load(args, task))
    rollouts = sample_group(setup, problem, args.group_size)
    rewards = score_group(without_thoughts(rollouts, setup), problem, args, setup.task)
    if task.game:
        outcomes = played_on(setup, [problem], rollouts, [args.seed])  # (1, G)
        rewards = with_another(rewards, "outcome", outcomes)
    advantages = advantages_of(rewards, args)  # (1, G)
    print("\n".join(group_lines(problem, rollouts, rewards, advantages, args)), flush=True)


def group_lines(problem, rollouts, rewards, advantages, args):
    """The group as lines of text. advantages: (1, G)."""
    width = min(shutil.get_terminal_size((WIDEST, 24)).columns, WIDEST)
    mean, std = rewards.total.mean().item(), rewards.total.std().item()
    gold = problem.answer if problem.answer != NO_ANSWER else NEEDS_ONE
    lines = [
        *excerpt(f"question  {problem.question}", width, args.full),
        *excerpt(f"gold      {gold}", width, args.full),
        f"group     {args.group_size} completions at temperature {args.temperature:g}: "
        f"reward mean {mean:.3f}, std {std:.3f}",
    ]
    if not advantages.any():
        lines.append("All earned the same: no advantage, nothing to learn from this group.")
    logprobs = rollouts.logprobs[0].sum(-1) / rollouts.completion_mask[0].sum(-1)  # (G,)
    for g, text in enumerate(rollouts.texts[0]):
        pairs = zip(rewards.names, scores(rewards, g))
        earned = ", ".join(f"{name} {value:.4g}" for name, value in pairs)
        figures = (
            f"reward {rewards.total[0, g]:.3f}",
            f"advantage {advantages[0, g]:+.3f}",
            length(rollouts, g),
            f"mean log-prob {logprobs[g]:.3f}",
        )
        lines += [
            "",
            f"{g + 1:>2}  {'   '.join(figures)}",
            *textwrap.wrap(earned, width, initial_indent="    ", subsequent_indent="    "),
            *(f"    | {line}" for line in excerpt(text, width - 6, args.full)),
        ]
    return lines


def excerpt(text, width, whole=False):
    """The text's lines, fit to be printed: at most `width` wide and with the middle left out, or
    `whole` as they are."""
    lines = printable(text.rstrip("\n"), kept="\n").split("\n")
    if whole:
        return lines
    lines = [part for line in lines for part in textwrap.wrap(line, width) or [""]]
    left_out = len(lines) - FIRST_LINES - LAST_LINES
    if left_out <= 1:
        return lines
    return [*lines[:FIRST_LINES], f"... {left_out} more lines ...", *lines[-LAST_LINES:]]
