"""Peak memory and time per completion of our step as the step grows, a process for each size.

Each size trains as main.py does, groups of --group_size; memory is the process's peak over all
rounds, resident, or on CUDA what torch allocated.

    python benchmarks/memory.py --dataset_path DIR_WITH_GSM8K

The last line is JSON: per size the peak and the seconds, and how much the peak grew from the first.
"""

import json
from pathlib import Path
from statistics import fmean

from common import Worker, median, table, training_flags, workload_parser


def main(argv=None):
    parser = training_flags(workload_parser(__doc__, rounds=1, warm_up=1, questions=False))
    parser.add_argument("--completions", type=int, nargs="+", default=[32, 64, 128, 256])
    args = parser.parse_args(argv)
    passed = {name: value for name, value in vars(args).items() if value is not None}
    del passed["completions"]

    sizes = []
    for completions in args.completions:
        # The worker of the comparison with TRL: a step for every line, and what it took.
        passed["questions"] = completions // args.group_size
        flags = [part for name, value in passed.items() for part in (f"--{name}", value)]
        worker = Worker(Path(__file__).with_name("vs_trl.py"), flags, "ours")
        print(f"{completions} completions: {worker.answer()}", flush=True)
        rounds = [worker.ask(number) for number in range(args.warm_up + args.rounds)]
        worker.close()
        counted = rounds[args.warm_up :]
        sizes.append({
            "completions": completions,
            "peak_gib": round(rounds[-1]["peak_gib"], 2),
            "seconds_per_completion": median([r["step"] / completions for r in counted], 3),
            "completion_length": round(fmean(r["tokens"] / completions for r in counted), 1),
        })  # fmt: skip
        print(sizes[-1], flush=True)
    growth = round(sizes[-1]["peak_gib"] / sizes[0]["peak_gib"], 2)
    print(table([("completions", "peak, GiB", "s per completion", "mean length"),
                 *(size.values() for size in sizes)]))  # fmt: skip
    print(json.dumps({"sizes": sizes, "growth": growth}))


if __name__ == "__main__":
    main()
