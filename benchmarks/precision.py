"""fp32, bf16 and fp16 side by side: how far sampler and trainer are apart, how long a step takes.

The same questions, sampled and trained on in each in turn, from the same weights, which a learning
rate of 0 leaves as they are. The policy's seconds are of one update's passes.

    python benchmarks/precision.py --dataset_path DIR_WITH_GSM8K

The last line is JSON: per precision medians over rounds.
"""

import json
import sys
from dataclasses import replace
from functools import partial

from common import load_questions, median, set_up, table, training_flags, workload_parser

FIGURES = ("mismatch", "grad_norm", "skipped", "sampling", "policy")


def main(argv=None):
    parser = training_flags(workload_parser(__doc__, rounds=1, warm_up=0))
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    import torch

    from training.precision import DTYPES, loss_scale_of

    setup, optimizer, _ = set_up(args, args.model_name, args.questions, mixed_precision="no")
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.0
    device, questions = setup.accelerator.device.type, load_questions(args)
    rounds = {name: [] for name in DTYPES}
    for number in range(args.warm_up + args.rounds):
        problems = questions.batch(number, args.questions)
        for name, dtype in DTYPES.items():
            # accelerate itself has fp16 on GPUs alone
            setup.accelerator.autocast = partial(
                torch.autocast, device, dtype or torch.bfloat16, enabled=dtype is not None
            )
            setup = replace(setup, loss_scale=loss_scale_of(name))
            figures = step(setup, optimizer, problems, number)
            print(f"round {number}: {name} {figures}", flush=True)
            rounds[name] += [figures] * (number >= args.warm_up)
    result = {
        name: {figure: median([one[figure] for one in of_it], 6) for figure in FIGURES}
        for name, of_it in rounds.items()
    }
    rows = [(name, *(f"{value:.3g}" for value in row.values())) for name, row in result.items()]
    print(table([("", *FIGURES), *rows]))
    print(json.dumps(result))


def step(setup, optimizer, problems, number):
    """FIGURES of one step of sampling and training; every completion counts, whatever it says."""
    import torch

    from sampling.groups import sample_groups
    from training.update import update_policy
    from utils import mixed_seed

    seeds = [mixed_seed(number, q) for q in range(len(problems))]
    with setup.stopwatch("sampling"):
        rollouts = sample_groups(setup, problems, seeds)
    advantages = torch.linspace(-1, 1, setup.args.group_size).expand(len(problems), -1)  # (Q, G)
    metrics = update_policy(setup, optimizer, rollouts, advantages)
    figures = metrics | setup.stopwatch.lap()
    return {name: round(figures[name], 6) for name in FIGURES}


if __name__ == "__main__":
    main()
