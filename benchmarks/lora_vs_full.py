"""Peak memory and time of a GRPO step with LoRA against one that trains all weights, in turn.

Both are ours, as main.py runs a step, on the same questions from the same weights; each has a
process of its own and works while the other waits. The learning rate is so low that the models
stay alike. Memory is the peak of a process over the whole run: resident, or on CUDA what torch
allocated. The update is reference, policy and optimizer.

    python benchmarks/lora_vs_full.py --dataset_path DIR_WITH_GSM8K

The last line is JSON: medians over rounds, ratios LoRA / full with their range over rounds.
"""

import json
import sys

from common import (
    Worker,
    median,
    ratios,
    span,
    table,
    take_turns,
    training_flags,
    work_ours,
    workload_parser,
)

SECONDS = ("sampling", "update", "step")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = training_flags(workload_parser(__doc__, rounds=3, warm_up=1))
    parser.add_argument("--lora_rank", type=int, default=16)
    args = parser.parse_args(argv)
    if args.worker:
        return work_ours(args, args.lora_rank if args.worker == "lora" else 0)
    workers = [Worker(__file__, argv, name) for name in ("full", "lora")]
    replies = take_turns(workers, args, show)
    print(json.dumps(summary(args, replies)))


def show(reply):
    spent = ", ".join(f"{name} {reply[name]:6.1f} s" for name in SECONDS)
    return f"{reply['tokens']:6} tokens, {spent}, peak {reply['peak_gib']:.2f} GiB"


def summary(args, replies):
    """Print the table; returns what goes into the last line."""
    seconds = {
        side: {name: [reply[name] for reply in rounds] for name in SECONDS}
        for side, rounds in replies.items()
    }
    peaks = {side: rounds[-1]["peak_gib"] for side, rounds in replies.items()}
    result = {"lora_rank": args.lora_rank, "completions": args.questions * args.group_size,
              "rounds": args.rounds}  # fmt: skip
    rows = [("", "LoRA", "all weights", "ratio")]
    for name in SECONDS:
        for side in replies:
            result[f"{side}_{name}_seconds"] = median(seconds[side][name], 3)
        result |= ratios(seconds["lora"][name], seconds["full"][name], f"{name}_")
        rows.append((f"{name}, s", *(result[f"{side}_{name}_seconds"] for side in ("lora", "full")),
                     span(result, f"{name}_")))  # fmt: skip
    for side in replies:
        result[f"{side}_peak_gib"] = round(peaks[side], 2)
    result["memory_ratio"] = round(peaks["lora"] / peaks["full"], 2)
    rows.append(("peak memory, GiB", result["lora_peak_gib"], result["full_peak_gib"],
                 result["memory_ratio"]))  # fmt: skip
    print(table(rows))
    return result


if __name__ == "__main__":
    main()
