"""The command lines of evaluator.py (compare, run, lint), llms.py (chat) and sampler.py (a group).

As in flags.py, nothing heavy is imported before the arguments are known to be right.
"""

import os
import re
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import flags
from utils import UserError, hint, keep_freed_memory, one_line

# Those of main.py's flags that an evaluation depends on, and one question's answers.
EVALUATION_FLAGS = (
    "preset", "output_dir", "seed", "dataset_name", "dataset_path", "difficulty", "evaluator",
    "max_completion_length", "temperature", "eval_problems", "eval_batch_size", "eval_samples",
    "reward_timeout",
)  # fmt: skip
CHAT_FLAGS = (
    "preset", "seed", "dataset_name", "dataset_path", "difficulty", "evaluator",
    "max_completion_length", "reward_weights", "reward_timeout",
)  # fmt: skip
GROUP_FLAGS = (
    *CHAT_FLAGS, "group_size", "temperature", "top_k", "top_p", "min_p", "advantage_scale",
    "baseline",
)  # fmt: skip
WITH_A_MODEL = ("run", "chat")


def build_parsers(prog, argv):
    """(the parser of the file `prog`, {command: its parser}), {} where it is a command itself."""
    # fmt: off
    if prog == "sampler.py":
        text = ("Sample one group and print every completion with its rewards and its advantage: "
                "GRPO, seen by hand.")
        parser = _parser(flags.Parser, text, prog=prog)
        add_model(parser, argv, GROUP_FLAGS)
        parser.add_argument("ask", nargs="?", metavar="QUESTION", help="or --question N")
        add_question(parser)
        parser.add_argument("--full", action="store_true", help="print completions whole")
        return parser, {}
    text = {
        "evaluator.py": "Compare runs, evaluate a model, or check the rewards. The reward "
                        "functions themselves are in this file: edit them there.",
        "llms.py": "Put questions to a model, as they are put to it in training.",
    }[prog]
    parser = _parser(flags.Parser, text, prog=prog)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name, text):
        return _parser(commands.add_parser, text, name=name, help=text)

    if prog == "llms.py":
        chat = add("chat", "print answers while they are sampled; one that is known is judged")
        add_model(chat, argv, CHAT_FLAGS)
        chat.add_argument("--ask", metavar="TEXT", help="one question; without it, and without "
                          "--question, they are read from the terminal")
        add_question(chat)
        chat.add_argument("--temperature", type=flags.NOT_NEGATIVE, default=0.0,
                          help="of sampling; 0: greedy")
        return parser, commands.choices
    compare = add("compare", "compare two runs' answers to the same held-out questions")
    compare.add_argument("runs", nargs=2, metavar="RUN", help="a run's directory, or RUN@STEP; "
                         "without a step, its last evaluation")
    compare.add_argument("--show", type=flags.COUNT, default=2, metavar="N",
                         help="questions gained and questions lost to print whole, N of each")
    run = add("run", "evaluate any model on held-out problems, as main.py does around training")
    add_model(run, argv, EVALUATION_FLAGS)
    lint = add("lint", "score a golden set of completions and say what is wrong with the rewards")
    for flag in ("--reward_weights", "--evaluator"):
        lint._add_action(flags.build_parser("h100")._option_string_actions[flag])
    # fmt: on
    return parser, commands.choices


def _parser(make, text, **more):
    return make(description=text, formatter_class=flags.Help, allow_abbrev=False, **more)


def add_model(parser, argv, names):
    """MODEL and those of main.py's flags that are named, with the defaults of its preset.

    The others are there at their defaults, for the checks in flags.py, but cannot be given.
    """
    parser.add_argument("model_name", metavar="MODEL", help="Hugging Face hub name, local "
                        f"directory such as RUN/model, or {flags.EMBEDDED_MODEL}")  # fmt: skip
    full = flags.build_parser(*flags.preset_and_dataset(argv, parser.prog))
    for action in full._actions:
        if action.dest in names:
            parser._add_action(action)
    defaults = {action.dest: full.get_default(action.dest) for action in full._actions}
    hidden = ("help", "model_name", "max_prompt_length", "sampling_batch_size")
    parser.set_defaults(**{name: value for name, value in defaults.items() if name not in hidden})
    # No question is left out for its length, and no group sampled in parts.
    parser.set_defaults(max_prompt_length=0, sampling_batch_size=0)


def add_question(parser):
    # fmt: off
    parser.add_argument("--answer", metavar="GOLD", help="the right answer to the question given "
                        "as text")
    parser.add_argument("--question", type=flags.COUNT, metavar="N",
                        help="question N of the dataset, counted from 0")
    parser.add_argument("--split", choices=("test", "train"), default="test",
                        help="of the dataset, for --question")
    # fmt: on


def check_question(args):
    """Raise UserError where not one question is asked, or it or its answer is no text."""
    if args.ask is not None and args.question is not None:
        raise UserError(f"--question {args.question}: there is a question as text already; leave "
                        "one of them out")  # fmt: skip
    if args.command == "group" and args.ask is None and args.question is None:
        raise UserError("which question? Give it as text, or --question N of a dataset")
    if args.answer is not None and args.ask is None:
        raise UserError("--answer: goes with a question as text; leave it out")
    for name, text in (("the question", args.ask), ("--answer", args.answer)):
        if text is not None and (not text.strip() or re.search("[\ud800-\udfff]", text)):
            raise UserError(f"{name} {text!r}: is empty, or holds characters that are not text")


def parse_args(argv=None, prog="evaluator.py"):
    """The checked arguments, with `command`. Exits with status 2 and one line for a mistake."""
    argv = sys.argv[1:] if argv is None else list(argv)
    command = "group" if prog == "sampler.py" else (argv or [""])[0]
    parser, commands = build_parsers(prog, argv if command in (*WITH_A_MODEL, "group") else [])
    if commands:
        if command.startswith("-") or not command:
            parser.parse_args(argv)  # help, or what is missing
        if command not in commands:
            parser.error(f"unknown command {command}; {hint(command, commands)}")
        parser, argv = commands[command], argv[1:]
    args = flags.parse_known(parser, argv)
    args.command = command
    try:
        if command == "run":
            _check_run(args)
        elif "ask" in args:
            _check_question_and_model(args)
    except UserError as error:
        parser.error(_of_a_model(error))
    return args


def _check_run(args):
    if args.output_dir is None:
        model = "-".join(Path(args.model_name).parts[-2:]).lower().strip("/")
        args.output_dir = flags.run_directory(args, model)
    for check in (flags.check_flags, flags.check_dataset, flags.check_model,
                  flags.check_output_dir):  # fmt: skip
        check(args)
    kept = (*EVALUATION_FLAGS, "model_name", "command")
    args.__dict__ = {name: value for name, value in vars(args).items() if name in kept}


def _check_question_and_model(args):
    args.reward_weights = dict(args.reward_weights)
    check_question(args)
    flags.check_flags(args)
    if args.question is not None:
        flags.check_dataset(args)
    flags.check_model(args)


def _of_a_model(error):
    """What flags.py and llms.py say of --model_name, where that is called MODEL."""
    return str(error).replace("--model_name ", "MODEL ")


def main(argv=None, prog="evaluator.py"):
    """Carry out one command of the file `prog`. Returns the exit status."""
    args = parse_args(argv, prog)
    name = prog if args.command == "group" else f"{prog} {args.command}"
    carry_out = {"compare": _compare, "run": _run, "lint": _lint}.get(args.command, _try_model)
    try:
        return carry_out(args)
    except UserError as error:
        print(one_line(f"{name}: error: {_of_a_model(error)}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


@contextmanager
def _importing():
    """Around imports that take seconds: Ctrl-C ends them without a traceback."""
    keep_freed_memory()
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, before)


def _compare(args):
    from comparison import compare, read_evaluation

    print(compare(*map(read_evaluation, args.runs), args.show), flush=True)
    return 0


def _run(args):
    with _importing():
        from evaluation import evaluate_and_save

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


def _try_model(args):
    with _importing():
        from chat import chat, show_group

    (show_group if args.command == "group" else chat)(args)
    return 0
