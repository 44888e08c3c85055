"""Everything that `python main.py` does besides training: `python main.py COMMAND ...`.

Nothing heavy is imported before the arguments are known to be right, and torch only by the commands
that need a model.
"""

import gc
import os
import re
import signal
import sys
from contextlib import contextmanager
from datetime import date
from pathlib import Path

from launch.checks import (
    START,
    check_dataset,
    check_flags,
    check_model,
    check_output_dir,
    check_referee,
    check_rewards,
)
from launch.parser import (
    Help,
    Parser,
    build_parser,
    parse_args,
    parse_known,
    preset_and_dataset,
    run_directory,
)
from launch.values import COUNT, NOT_NEGATIVE
from records.resuming import flags_of_model
from tasks import check_weights, has_own_evaluator, load_task, own_evaluator
from training.progress import progress
from utils import EMBEDDED_MODEL, EMBEDDED_SIGHTED, UserError, hint, one_line

COMMANDS = {
    "lint": "score a golden set of completions, and with a dataset its own gold answers, and say "
    "what is wrong with the rewards",
    "compare": "compare two runs' answers to the same held-out questions",
    "evaluate": "evaluate any model on held-out problems, as a run does around training",
    "chat": "put questions to a model as in training; an answer that is known is judged",
    "play": "play a game of self-play, such as kuhn, against a model in the terminal",
    "group": "sample one group and show every completion's rewards and advantage",
    "plan": "say what a run would take in memory and time, and which flags make it fit",
    "plot": "draw runs as PNGs; several are laid over each other",
    "report": "write a run's report.html anew",
}
# The flags of a run that an evaluation depends on, and one question's answers.
PROMPT_FLAGS = ("enable_thinking", "chat_template_kwargs", "prompt_date", "stop", "image_tokens")
DATA_FLAGS = ("seed", "dataset_name", "dataset_path", "question_field", "answer_field",
              "solution_field", "train_split", "test_split", "difficulty")  # fmt: skip
EVALUATION_FLAGS = (
    *PROMPT_FLAGS, *DATA_FLAGS, "preset", "output_dir",
    "evaluator", "max_completion_length", "temperature", "eval_problems", "eval_batch_size",
    "eval_samples", "reward_timeout", "reward_workers", "allow_weak_verifier", "rebuttals",
)  # fmt: skip
# And those by which a game is played, which cannot be given.
GAME_FLAGS = ("sampler", "sampling_batch_size", "micro_batch_tokens", "top_k", "top_p", "min_p")
CHAT_FLAGS = (
    *PROMPT_FLAGS, *DATA_FLAGS, "preset", "evaluator",
    "max_completion_length", "reward_weights", "reward_timeout", "allow_weak_verifier",
)  # fmt: skip
PLAY_FLAGS = (*PROMPT_FLAGS, "preset", "seed", "dataset_name", "max_completion_length",
              "temperature", "top_k", "top_p", "min_p")  # fmt: skip
LINT_FLAGS = (
    "reward_weights", "evaluator", *DATA_FLAGS, "reward_timeout", "preset", "model_name", "referee",
    "referee_url", "referee_model", "eval_referee",
)  # fmt: skip
GROUP_FLAGS = (
    *CHAT_FLAGS, "group_size", "temperature", "top_k", "top_p", "min_p", "advantage_scale",
    "baseline", "referee", "referee_url", "referee_model", "referee_pairs", "referee_anyway",
)  # fmt: skip


def commands_text():
    """The commands as `python main.py --help` lists them."""
    lines = (f"  {name:10}{text}" for name, text in COMMANDS.items())
    return "\n".join(["commands, each with its own --help: python main.py COMMAND ...", *lines])


# --- what each command takes ---------------------------------------------------------------------


def build_command_parser(name, argv=()):
    """The parser of one command; `argv` decides about its defaults, see preset_and_dataset."""
    parser = Parser(
        prog=f"main.py {name}", description=f"{COMMANDS[name][0].upper()}{COMMANDS[name][1:]}.",
        formatter_class=Help, allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    # fmt: off
    if name == "lint":
        add_flags_of_a_run(parser, argv, LINT_FLAGS)
        parser.set_defaults(dataset_name=None, max_prompt_length=0, max_completion_length=0)
    elif name == "compare":
        add("runs", nargs=2, metavar="RUN", help="a run's directory, or RUN@STEP; without a step, "
            "its last evaluation")
        add("--show", type=COUNT, default=2, metavar="N", help="questions gained and questions "
            "lost to print whole, N of each")
    elif name == "evaluate":
        add_model(parser, argv, EVALUATION_FLAGS)
    elif name == "chat":
        add_model(parser, argv, CHAT_FLAGS)
        add("ask", nargs="?", metavar="QUESTION", help="one question; without it, and without "
            "--question, they are read from the terminal")
        add_question(parser)
        add("--temperature", type=NOT_NEGATIVE, default=0.0, help="of sampling; 0: greedy")
    elif name == "play":
        add_model(parser, argv, PLAY_FLAGS)
    elif name == "group":
        add_model(parser, argv, GROUP_FLAGS)
        add("ask", nargs="?", metavar="QUESTION", help="or --question N")
        add_question(parser)
        add("--full", action="store_true", help="print completions whole")
    elif name == "plot":
        add("runs", nargs="*", metavar="RUN", help="a run's directory")
        add("--log_dir", metavar="RUN", help="the same, as one flag")
        add("--output_dir", metavar="DIR", help="default: RUN/plots; for several runs: comparison")
        add("--mean", action="store_true", help="runs that differ in nothing but --seed become one "
            "line, their mean, and a band from the lowest to the highest")
        add("--report", action="store_true", help="write every RUN/report.html too")
    elif name == "report":
        add("runs", nargs="+", metavar="RUN", help="a run's directory")
    # fmt: on
    return parser


def add_model(parser, argv, names):
    """MODEL and those of a run's flags that are named, with the defaults of its preset.

    The others are there at their defaults, for the checks, but cannot be given.
    """
    parser.add_argument("model_name", metavar="MODEL", help="Hugging Face hub name, directory such "
                        f"as RUN/model, {EMBEDDED_MODEL} or {EMBEDDED_SIGHTED}")  # fmt: skip
    add_flags_of_a_run(parser, argv, names)
    # No question is left out for its length, and no group sampled in parts.
    parser.set_defaults(max_prompt_length=0, sampling_batch_size=0)
    parser.set_defaults(**dict.fromkeys(PROMPT_FLAGS))  # see ask_as_its_run_did


def add_flags_of_a_run(parser, argv, names):
    """Those of a run's flags that are named; the others cannot be given and have their defaults."""
    full = build_parser(*preset_and_dataset(argv, parser.prog))
    for action in full._actions:
        if action.dest in names:
            parser._add_action(action)
    defaults = {action.dest: full.get_default(action.dest) for action in full._actions}
    hidden = ("help", *(() if "model_name" in names else ("model_name",)))
    parser.set_defaults(**{name: value for name, value in defaults.items() if name not in hidden})


def ask_as_its_run_did(args):
    """Set the PROMPT_FLAGS that are not given: to those of the run whose model this is, if any."""
    flags = flags_of_model(args.model_name)
    ours = {"enable_thinking": False, "chat_template_kwargs": {}, "stop": [],
            "prompt_date": date.today().isoformat(), "image_tokens": 256}  # fmt: skip
    for name in PROMPT_FLAGS:
        if getattr(args, name) is None:
            setattr(args, name, flags.get(name, ours[name]))


def add_question(parser):
    # fmt: off
    parser.add_argument("--answer", metavar="GOLD", help="the right answer to the question given "
                        "as text")
    parser.add_argument("--image", nargs="+", default=[], metavar="FILE", help="what the question "
                        "given as text shows, for a model that sees")
    parser.add_argument("--question", type=COUNT, metavar="N",
                        help="question N of the dataset, counted from 0")
    parser.add_argument("--split", choices=("test", "train"), default="test",
                        help="of the dataset, for --question")
    # fmt: on


def parse_command(argv):
    """The checked arguments of `COMMAND ...`, with `command`. Exits with status 2 and one line for
    a mistake."""
    name, *rest = argv
    if name not in COMMANDS:
        trains = "without a command it trains" if name in ("train", "run") else hint(name, COMMANDS)
        Parser(prog="main.py").error(f"unknown command {name}; {trains}")
    if name == "plan":
        args = parse_args([*rest, "--plan"], prog="main.py plan")
        args.command = name
        return args
    parser = build_command_parser(name, rest)
    args = parse_known(parser, rest)
    args.command = name
    try:
        if name in ("evaluate", "chat", "play", "group"):
            ask_as_its_run_did(args)
        if name == "evaluate":
            _check_evaluate(args)
        elif name == "play":
            _check_play(args)
        elif name in ("chat", "group"):
            _check_question_and_model(args)
        elif name == "lint":
            check_referee(args)
            if args.referee == START:
                check_model(args)
        elif name == "plot":
            args.runs += [args.log_dir] if args.log_dir else []
            if not args.runs:
                raise UserError("name at least one run, e.g. runs/demo")
    except UserError as error:
        parser.error(_of_a_model(error))
    return args


def _check_evaluate(args):
    if args.output_dir is None:
        model = "-".join(Path(args.model_name).parts[-2:]).lower().strip("/")
        args.output_dir = run_directory(args, model)
    for check in (check_flags, check_dataset, check_model, check_output_dir):
        check(args)
    kept = [*EVALUATION_FLAGS, "model_name", "command"]
    kept += GAME_FLAGS if load_task(args).game else ()
    args.__dict__ = {name: value for name, value in vars(args).items() if name in kept}


def _check_play(args):
    check_flags(args)
    if load_task(args).game is None:
        raise UserError(f"--dataset_name {args.dataset_name}: is no game; name one, e.g. kuhn")
    check_model(args)


def _check_question_and_model(args):
    args.reward_weights = dict(args.reward_weights)
    check_question(args)
    check_flags(args)
    if args.question is not None:
        check_dataset(args)
    if args.command == "group":
        check_rewards(load_task(args), args)
    check_model(args)


def check_question(args):
    """Raise UserError where not one question is asked, or it or its answer is no text."""
    if args.ask is not None and args.question is not None:
        raise UserError(f"--question {args.question}: there is a question as text already; leave "
                        "one of them out")  # fmt: skip
    if args.command == "group" and args.ask is None and args.question is None:
        raise UserError("which question? Give it as text, or --question N of a dataset")
    for flag in ("answer", "image"):
        if getattr(args, flag) not in (None, []) and args.ask is None:
            raise UserError(f"--{flag}: goes with a question as text; leave it out")
    for name, text in (("the question", args.ask), ("--answer", args.answer)):
        if text is not None and (not text.strip() or re.search("[\ud800-\udfff]", text)):
            raise UserError(f"{name} {text!r}: is empty, or holds characters that are not text")


def _of_a_model(error):
    """What the checks say of --model_name, where that is called MODEL."""
    return str(error).replace("--model_name ", "MODEL ")


# --- what each command does ----------------------------------------------------------------------


def carry_out(args):
    """Carry out one command. Returns the exit status."""
    name = f"main.py {args.command}"
    try:
        return DO[args.command](args) or 0
    except (UserError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # whoever read the output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        if isinstance(error, OSError) and args.command != "plot":
            raise
        text = str(error) if args.command == "plan" else _of_a_model(error)
        print(one_line(f"{name}: error: {text}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return 130


def main(argv):
    """`python main.py COMMAND ...`. Returns the exit status."""
    return carry_out(parse_command(argv))


@contextmanager
def _importing():
    """Around imports that take seconds: Ctrl-C ends them without a traceback."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, before)


def _lint(args):
    from evaluation.reward_lint import is_golden, lint, report, report_of_problems
    from evaluator import REWARD_FUNCTIONS

    weights, lines, found = dict(args.reward_weights), [], 0
    own = own_evaluator(args.evaluator) if has_own_evaluator(args) else {}
    task, problems = None, []
    if args.dataset_name or args.dataset_path:
        args.dataset_name = args.dataset_name or "gsm8k"
        check_dataset(args)
        task = load_task(args)
        problems = task.problems("test")
    functions = task.reward_functions if task else own.get("REWARD_FUNCTIONS", REWARD_FUNCTIONS)
    check_weights(weights, functions)
    if task is None or is_golden(task, problems):
        result = lint(functions, weights, args.reward_timeout, own.get("is_correct"),
                      own.get("worked_answer"))  # fmt: skip
        lines, found = [report(result)], len(result.findings)
    if task:
        text, complaints = report_of_problems(task, problems, weights, args.reward_timeout)
        lines, found = [*lines, text], found + complaints
    if args.referee or args.referee_url:
        with _importing():
            from evaluation import referees

        args.dataset_name = args.dataset_name or "gsm8k"  # whose problems nobody reads
        args.prompt_date = args.prompt_date or date.today().isoformat()
        text, refused = referees.report(args, task or load_task(args))
        lines, found = [*lines, text], found + refused
    print("\n\n".join(lines), flush=True)
    return 1 if found else 0


def _compare(args):
    from evaluation.comparison import compare, read_evaluation

    print(compare(*map(read_evaluation, args.runs), args.show), flush=True)


def _evaluate(args):
    with _importing():
        from launch.loading import evaluate_and_save

    evaluate_and_save(args)


def _chat(args):
    with _importing():
        from evaluation.chat import chat

    chat(args)


def _play(args):
    with _importing():
        from evaluation.play import play_with_a_person

    play_with_a_person(args)


def _group(args):
    with _importing():
        from evaluation.chat import show_group

    show_group(args)


def _plan(args):
    print("One step on tensors that have no memory, in a fraction of a minute ...\n", flush=True)
    progress.__enter__()  # torch takes seconds to import
    gc.disable()  # an eighth of the time, and hardly anything is left for it to find
    with _importing():
        from launch.planner import plan

    plan(args)


def _plot(args):
    from records.files import Series, over_seeds
    from records.plots import plot_runs

    runs = [Series(path) for path in args.runs]
    folder = Path(args.runs[0]) / "plots" if len(runs) == 1 else Path("comparison")
    if args.mean and len(runs) > 1:
        runs = over_seeds(runs)
    print(plot_runs(runs, Path(args.output_dir or folder)).resolve())
    return _report(args) if args.report else 0


def _report(args):
    from records.report import write_report

    for path in args.runs:
        print(write_report(path))


DO = {
    "lint": _lint, "compare": _compare, "evaluate": _evaluate, "chat": _chat, "play": _play,
    "group": _group, "plan": _plan, "plot": _plot, "report": _report,
}  # fmt: skip
