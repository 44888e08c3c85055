"""The command line of evaluator.py: compare, run, lint.

As in flags.py, nothing heavy is imported before the arguments are known to be right.
"""

import os
import signal
import sys
from pathlib import Path

import flags
from utils import UserError, hint, keep_freed_memory, one_line

# Those of main.py's flags that an evaluation depends on.
EVALUATION_FLAGS = (
    "preset", "output_dir", "seed", "dataset_name", "dataset_path", "difficulty", "evaluator",
    "max_completion_length", "temperature", "eval_problems", "eval_batch_size", "eval_samples",
    "reward_timeout",
)  # fmt: skip


def build_parsers(argv):
    """(the parser of `evaluator.py`, {command: its parser})."""
    parser = flags.Parser(
        prog="evaluator.py",
        description="Compare runs, evaluate a model, or check the rewards. The reward functions "
        "themselves are in this file: edit them there.",
        formatter_class=flags.Help,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name, text):
        return commands.add_parser(
            name, help=text, description=text, formatter_class=flags.Help, allow_abbrev=False
        )

    # fmt: off
    compare = add("compare", "compare two runs' answers to the same held-out questions")
    compare.add_argument("runs", nargs=2, metavar="RUN", help="a run's directory, or RUN@STEP; "
                         "without a step, its last evaluation")
    compare.add_argument("--show", type=flags.COUNT, default=2, metavar="N",
                         help="questions gained and questions lost to print whole, N of each")
    run = add("run", "evaluate any model on held-out problems, as main.py does around training")
    run.add_argument("model_name", metavar="MODEL", help="Hugging Face hub name, local directory "
                     f"such as RUN/model, or {flags.EMBEDDED_MODEL}")
    add_evaluation_flags(run, argv)
    lint = add("lint", "score a golden set of completions and say what is wrong with the rewards")
    for flag in ("--reward_weights", "--evaluator"):
        lint._add_action(flags.build_parser("h100")._option_string_actions[flag])
    # fmt: on
    return parser, {"compare": compare, "run": run, "lint": lint}


def add_evaluation_flags(parser, argv):
    """main.py's flags that an evaluation depends on, with the defaults of its preset.

    The others are there at their defaults, for the checks in flags.py, but cannot be given.
    """
    full = flags.build_parser(*flags.preset_and_dataset(argv, parser.prog))
    for action in full._actions:
        if action.dest in EVALUATION_FLAGS:
            parser._add_action(action)
    defaults = {action.dest: full.get_default(action.dest) for action in full._actions}
    hidden = ("help", "model_name", "max_prompt_length")
    parser.set_defaults(**{name: value for name, value in defaults.items() if name not in hidden})
    parser.set_defaults(max_prompt_length=0)  # no question is left out for its length


def parse_args(argv=None):
    """The checked arguments, with `command`. Exits with status 2 and one line for a mistake."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser, commands = build_parsers(argv[1:] if argv[:1] == ["run"] else [])
    if not argv or argv[0].startswith("-"):
        parser.parse_args(argv)  # help, or what is missing
    if argv[0] not in commands:
        parser.error(f"unknown command {argv[0]}; {hint(argv[0], commands)}")
    parser = commands[argv[0]]
    args = flags.parse_known(parser, argv[1:])
    args.command = argv[0]
    if args.command == "run":
        if args.output_dir is None:
            model = "-".join(Path(args.model_name).parts[-2:]).lower().strip("/")
            args.output_dir = flags.run_directory(args, model)
        try:
            for check in (flags.check_flags, flags.check_dataset, flags.check_model,
                          flags.check_output_dir):  # fmt: skip
                check(args)
        except UserError as error:
            parser.error(str(error).replace("--model_name ", "MODEL "))
        kept = (*EVALUATION_FLAGS, "model_name", "command")
        args.__dict__ = {name: value for name, value in vars(args).items() if name in kept}
    return args


def main(argv=None):
    """Carry out one command. Returns the exit status."""
    args = parse_args(argv)
    try:
        return {"compare": _compare, "run": _run, "lint": _lint}[args.command](args)
    except UserError as error:
        print(one_line(f"evaluator.py {args.command}: error: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nevaluator.py {args.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _compare(args):
    from comparison import compare, read_evaluation

    print(compare(*map(read_evaluation, args.runs), args.show), flush=True)
    return 0


def _run(args):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports without a traceback
    keep_freed_memory()
    from evaluation import evaluate_and_save

    signal.signal(signal.SIGINT, signal.default_int_handler)
    evaluate_and_save(args)
    return 0


def _lint(args):
    from evaluator import REWARD_FUNCTIONS, check_weights
    from reward_lint import lint, report

    functions, weights = REWARD_FUNCTIONS, dict(args.reward_weights)
    if flags.has_own_evaluator(args):
        from tasks import own_evaluator

        functions = own_evaluator(args.evaluator)["REWARD_FUNCTIONS"]
    check_weights(weights, functions)
    result = lint(functions, weights)
    print(report(result), flush=True)
    return 1 if result.findings else 0
