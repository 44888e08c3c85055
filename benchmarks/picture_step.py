"""What pictures cost: a step whose questions show one each, and the same without, in turn.

    python benchmarks/picture_step.py --questions 8 --max_completion_length 32

Both sample and train completions of exactly the same lengths, since nothing ends one early. The
pictures are drawn and seen in every step anew, as in a run. The last line is JSON: median seconds
of both, and the ratio with its range over rounds.
"""

import json
import time
from dataclasses import replace

from common import median, our_step, ratios, set_up, training_flags, workload_parser


def main(argv=None):
    parser = training_flags(workload_parser(__doc__, rounds=5, warm_up=1))
    parser.set_defaults(model_name="smollm2-135m+vision", kl_beta=0.0, temperature=1.2)
    args = parser.parse_args(argv)
    from utils import keep_freed_memory

    keep_freed_memory()
    from rldatasets import Problems
    from sampling import groups
    from tasks.shapes import problems

    setup, optimizer, scheduler = set_up(args, args.model_name, args.questions)
    padding = groups.padding_and_stops(setup.policy, setup.tokenizer)[0]
    groups.padding_and_stops = lambda *_: (padding, [])
    shown = Problems(problems("train", 0, "colour"), 0)
    seconds = {"with": [], "without": []}
    for number in range(args.warm_up + args.rounds):
        drawn = shown.batch(number, args.questions)
        for name, asked in (("with", drawn), ("without", [replace(p, images=()) for p in drawn])):
            started = time.perf_counter()
            our_step(setup, optimizer, scheduler, asked, number)
            spent = time.perf_counter() - started
            counts = number >= args.warm_up
            seconds[name] += [spent] * counts
            print(f"round {number}: {name:8} {spent:6.1f} s{'' if counts else '  (warm-up)'}",
                  flush=True)  # fmt: skip
    print(json.dumps({
        **{f"{name}_seconds": median(values, 2) for name, values in seconds.items()},
        **ratios(seconds["with"], seconds["without"]),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
