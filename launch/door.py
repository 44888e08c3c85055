"""The one door: what `python main.py ...` asks for, known before anything heavy is imported.

main.py imports this module first. Where it is main.py that Python runs, any command but training is
carried out here, and what comes back is ARGS, the checked flags of a run; else ARGS is None.
"""

import sys

from launch.again import is_running  # before the others, which it would import twice
from launch.commands import carry_out, commands_text, parse_command
from launch.interrupts import exit_on_signals, silence_all_but_main
from launch.parser import parse_args
from records.resuming import has_finished
from training.progress import progress
from utils import keep_freed_memory


def enter(argv):
    """The flags of a run. Ends the process where `argv` asks for something else."""
    keep_freed_memory()
    if argv and not argv[0].startswith("-"):
        sys.exit(carry_out(parse_command(argv)))
    silence_all_but_main()
    exit_on_signals()
    args = parse_args(argv, epilog=commands_text())
    if args.plan:
        args.command = "plan"
        sys.exit(carry_out(args))
    if has_finished(args):
        print(f"{args.output_dir} has finished its {args.num_train_iters} steps; it goes on where "
              "--num_train_iters is raised")  # fmt: skip
        sys.exit()
    progress.__enter__()  # torch takes seconds to import
    return args


ARGS = enter(sys.argv[1:]) if is_running() else None
