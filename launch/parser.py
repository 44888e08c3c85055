"""The command line of a run: read, completed from a run that it resumes, and checked.

Nothing heavy is imported here, so that a typo is answered in a fraction of a second.
"""

import argparse
import difflib
import re
import sys
import time
from datetime import date
from pathlib import Path

from launch.checks import (
    check_dataset,
    check_flags,
    check_model,
    check_output_dir,
    check_rewards,
    check_trackers,
    idle_flags,
)
from launch.flags import add_flags
from launch.presets import A_GAME, PRESETS, PRESETS_ON
from records.resuming import (
    LATEST,
    check_same_flags,
    has_finished,
    run_to_resume,
    saved_flags,
)
from tasks import has_own_evaluator, is_on_hub, load_task, task_file
from tasks.games import is_game_file
from utils import UserError, one_line

TIS_CAP = 2.0  # of --sampler vllm, which computes otherwise than the trainer


class Flags(argparse.Namespace):
    """Values of flags, and in `typed`, which is none of them, the names of those that the command,
    or that of the run which it resumes, says."""

    __slots__ = ("typed",)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, one_line(f"{self.prog}: error: {message} (see --help)") + "\n")


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.HelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=34, width=100)

    def _fill_text(self, text, width, indent):
        if "\n" in text:  # a list, as it is
            return text
        return super()._fill_text(text, width, indent)


def build_parser(preset, dataset_name=None, prog="main.py", epilog=None):
    """The parser whose defaults are those of PRESETS[preset], on that dataset."""
    parser = Parser(
        prog=prog,
        epilog=epilog,
        description="Train a language model with GRPO. The defaults shown are those of the preset "
        f"in force, `{preset}`; a flag given on the command line always wins.",
        formatter_class=Help,
        allow_abbrev=False,
    )
    # argparse takes -1 for a value but -1e-6 for a flag.
    parser._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)
    add_flags(parser)
    dataset_name = dataset_name or PRESETS[preset]["dataset_name"]
    task = task_file(dataset_name)[0]
    if is_on_hub(dataset_name):
        task = "gsm8k"  # whose answers are as long as any
    elif is_game_file(dataset_name):
        task = A_GAME
    changed = PRESETS_ON.get((preset, task), {})
    parser.set_defaults(**{**PRESETS[preset], "dataset_name": dataset_name, **changed})
    return parser


def preset_and_dataset(argv, prog="main.py"):
    """What the defaults of all other flags depend on: (preset, dataset_name or None)."""
    first = Parser(prog=prog, add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=PRESETS, default="h100")
    first.add_argument("--dataset_name")
    first.add_argument("--dataset_path")
    chosen = first.parse_known_args(argv)[0]
    if chosen.dataset_name is None and chosen.dataset_path is not None:
        chosen.dataset_name = "gsm8k"  # a path means files, whatever the preset generates
    return chosen.preset, chosen.dataset_name


def take_up_saved_flags(parser, argv):
    """Where the command says --resume or --resume_or_start, make the run's flags the parser's
    defaults. Returns them, {} for a new run."""
    first = Parser(prog=parser.prog, add_help=False, allow_abbrev=False)
    first.add_argument("--output_dir")
    first.add_argument("--resume", nargs="?", const=LATEST)
    first.add_argument("--resume_or_start", action="store_true")
    chosen = first.parse_known_args(argv)[0]
    if chosen.resume is None and not chosen.resume_or_start:
        return {}
    resume = chosen.resume or LATEST
    try:
        output_dir = run_to_resume(resume, chosen.output_dir, chosen.resume_or_start)
        saved = saved_flags(output_dir)
    except UserError as error:
        parser.error(str(error))
    of_this_start = {"output_dir": output_dir, "resume": resume, "resume_or_start": False}
    # A flag that is newer than the run is as it is by itself, whatever the preset says today.
    before = _without_preset() if saved else {}
    parser.set_defaults(**{**before, **saved, **of_this_start})
    return saved


def _without_preset():
    """The values of the flags that have one of their own."""
    parser = Parser(add_help=False)
    add_flags(parser)
    return {action.dest: action.default for action in parser._actions if action.default is not None}


def parse_known(parser, argv):
    """The Flags; an unknown argument is an error that names the closest one.

    Words without a flag may stand anywhere among the flags.
    """
    args, unknown = parser.parse_known_intermixed_args(argv, Flags())
    words = {word.partition("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
    args.typed = {
        action.dest
        for action in parser._actions
        if not action.option_strings or words & {*action.option_strings}
    }
    if unknown:
        flags = parser._option_string_actions
        close = [flag for flag in flags if _initials(flag) == unknown[0].strip("-")]
        close = close or difflib.get_close_matches(unknown[0], flags, n=1)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        parser.error(f"unknown argument {unknown[0]}{hint}")
    return args


def _initials(flag):
    """ "lr" of --learning_rate."""
    return "".join(word[0] for word in flag.strip("-").split("_"))


def parse_args(argv=None, prog="main.py", epilog=None):
    """The checked flags of a run.

    Exits with status 2 and one line for every mistake that can be found before torch is imported.
    """
    parser = build_parser(*preset_and_dataset(argv, prog), prog, epilog)
    saved = take_up_saved_flags(parser, argv)
    args = parse_known(parser, argv)
    args.typed |= {*saved}
    if args.precision == "auto":  # of a run that goes on: what it was when that began
        args.precision = saved.get("precision", "auto")
    if args.sampler == "vllm" and "tis_cap" not in args.typed:
        args.tis_cap = TIS_CAP
    idle = idle_flags(args, parser.get_default)
    if args.clip_epsilon_high is None:
        args.clip_epsilon_high = args.clip_epsilon
    args.reward_weights = dict(args.reward_weights)
    args.prompt_date = args.prompt_date or date.today().isoformat()
    if args.output_dir is None:
        args.output_dir = run_directory(args, Path(args.model_name).name.lower())
    try:
        check_same_flags(args, saved)
        check_flags(args)
        check_trackers(args)
        if has_finished(args):  # and reads nothing any more
            return args
        if not args.plan:  # which reads no data
            check_dataset(args)
            check_rewards(load_task(args), args, parser.get_default)
        check_model(args)
        if not args.plan:  # which writes nothing
            check_output_dir(args)
    except UserError as error:
        parser.error(str(error))
    for line in idle:
        print(f"{prog}: warning: {line}", file=sys.stderr)
    return args


def run_directory(args, model):
    """Where a run goes that no --output_dir names, by its dataset, own rewards, model and time."""
    own = [Path(args.evaluator).stem] if has_own_evaluator(args) else []
    dataset, _, variant = task_file(args.dataset_name)
    dataset = f"{dataset}-{variant}" if variant else dataset
    names = [dataset, *own, model, time.strftime("%Y%m%d-%H%M%S")]
    return f"runs/{'-'.join(names)}"
