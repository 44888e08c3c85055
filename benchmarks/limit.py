"""How much of what the machine can do our steps use: sampling, reference pass, policy pass.

The limits: the rate that matrix products in the dtype of training (fp32 on a CPU, bf16 on CUDA)
keep up for a second, in the best of large and model-shaped sizes, by torch.matmul or as training
multiplies; and memory read and copied. What the machine has to give may change from minute to
minute, so the best product is timed again before and after every step, and the step is held against
the mean of these two. Against the limits stand the floating-point operations that the work *needs*,
however it is done: 2 per weight of a matrix and token read, a prompt once per group, the last token
of a completion never; the head only where a token is predicted; attention to what each token sees;
the backward pass twice the forward. Nothing computed again counts. Clipping and AdamW are in the
policy's seconds, not in its operations.

Sampling also has to read every weight once per token of the longest completion, and the cache; its
share is of the least time that either operations or bytes allow.

    python benchmarks/limit.py --dataset_path DIR_WITH_GSM8K

The last line is JSON: the limits, and per number of rows and stage operations, seconds and share.
"""

import json
import time
from statistics import fmean

from common import (
    load_questions,
    median,
    our_step,
    set_up,
    table,
    training_flags,
    workload_parser,
)


def main(argv=None):
    parser = training_flags(workload_parser(__doc__, rounds=2, warm_up=1, questions=False))
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 64, 128],
                        help="completions per step, in groups of --group_size")  # fmt: skip
    parser.add_argument("--largest", type=int, default=4096, help="size of the largest product")
    parser.add_argument("--megabytes", type=int, default=1024, help="read to measure bandwidth")
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="for each measurement of a limit"
    )
    args = parser.parse_args(argv)
    from utils import keep_freed_memory

    keep_freed_memory()
    import torch

    setup, optimizer, scheduler = set_up(args, args.model_name, args.rows[0] // args.group_size)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    problems = load_questions(args)
    products = product_ways(setup.policy, dtype, args.largest)
    best = max(products, key=lambda product: rate(product, args.seconds))
    bandwidth = max(rate(way, args.seconds) for way in memory_ways(setup.policy, dtype, args))
    limits, stages = [rate(best, args.seconds)], []
    for rows in args.rows:
        counted = []
        for number in range(args.warm_up + args.rounds):
            batch = problems.batch(number, rows // args.group_size)
            rollouts, seconds = our_step(setup, optimizer, scheduler, batch, number)
            limits.append(rate(best, args.seconds))
            limit = fmean(limits[-2:])
            print(f"{rows} rows, round {number}: " + ", ".join(
                f"{stage} {spent:.2f} s" for stage, spent in seconds.items()
            ) + f"; limit {limit / 1e9:.0f} GFLOP/s", flush=True)  # fmt: skip
            if number >= args.warm_up:
                counted.append((needs(setup.policy, rollouts, dtype.itemsize), seconds, limit))
        for stage in ("sampling", "reference", "policy"):
            if stage in seconds:
                stages.append({"rows": rows, "stage": stage, **shares(counted, stage, bandwidth)})

    print(f"limits: {min(limits) / 1e9:.0f} to {max(limits) / 1e9:.0f} GFLOP/s, "
          f"{bandwidth / 1e9:.1f} GB/s, {torch.get_num_threads()} threads, "
          f"{setup.accelerator.device}")  # fmt: skip
    print(table([
        ("rows", "stage", "GFLOP needed", "s", "GFLOP/s", "share of products", "share of limit"),
        *((stage["rows"], stage["stage"], f"{stage['operations'] / 1e9:.1f}",
           f"{stage['seconds']:.2f}", stage["gflops_per_second"],
           f"{stage['share_of_products']:.1%}", f"{stage['share_of_limit']:.1%}")
          for stage in stages),
    ]))  # fmt: skip
    print(json.dumps({
        "gflops_per_second": [round(limit / 1e9, 1) for limit in limits],
        "gigabytes_per_second": round(bandwidth / 1e9, 1),
        "stages": stages,
    }))  # fmt: skip


def shares(counted, stage, bandwidth):
    """A stage's operations and seconds, means over the rounds that count, and the medians of what
    share it reached of the products' rate and of the least time that products or memory allow."""
    backward = 3 if stage == "policy" else 1
    operations = [backward * need[0] for need, _, _ in counted]
    spent = [seconds[stage] for _, seconds, _ in counted]
    reads = [need[1] if stage == "sampling" else 0 for need, _, _ in counted]
    of_products = [o / s / limit for o, s, (_, _, limit) in zip(operations, spent, counted)]
    of_limit = [
        max(o / limit, r / bandwidth) / s
        for o, s, r, (_, _, limit) in zip(operations, spent, reads, counted)
    ]
    return {
        "operations": fmean(operations),
        "seconds": fmean(spent),
        "gflops_per_second": round(sum(operations) / sum(spent) / 1e9, 2),
        "share_of_products": median(of_products, 4),
        "share_of_limit": median(of_limit, 4),
    }


# --- what the work needs -----------------------------------------------------------------------


def needs(model, rollouts, itemsize):
    """(operations, bytes) that writing these completions needs; scoring needs the same operations.

    Operations: one pass over every prompt and every completion but its last token.
    """
    prompts = [len(ids) for ids in rollouts.prompt_ids]
    lengths = rollouts.completion_mask.sum(-1).tolist()  # Q lists of G
    return forward_flops(model, prompts, lengths), sampling_bytes(model, prompts, lengths, itemsize)


def sizes(model):
    """Weights in the layers' matrices, in the head, and the keys of one token over all layers."""
    from torch.nn import Linear

    modules = model.get_decoder().layers.modules()
    matrices = sum(module.weight.numel() for module in modules if isinstance(module, Linear))
    attention = model.get_decoder().layers[0].self_attn
    keys = len(model.get_decoder().layers) * attention.k_proj.out_features
    return matrices, model.get_output_embeddings().weight.numel(), keys


def forward_flops(model, prompts, lengths):
    """Operations of a forward pass. prompts: Q lengths, lengths: for each those of its group."""
    matrices, head, keys = sizes(model)
    width = keys * model.config.num_attention_heads // model.config.num_key_value_heads
    total = 0
    for prompt, group in zip(prompts, lengths):
        read = [length - 1 for length in group]  # nothing is predicted from the last token
        pairs = seen(0, prompt) + sum(seen(prompt, count) for count in read)
        total += 2 * matrices * (prompt + sum(read))
        total += 2 * head * (1 + sum(read))  # the first token's distribution is the group's
        total += 4 * width * pairs  # two products, with keys and with values
    return total


def seen(past, count):
    """How many tokens `count` tokens see that follow `past` others, themselves included."""
    return count * past + count * (count + 1) // 2


def sampling_bytes(model, prompts, lengths, itemsize):
    """Bytes that sampling reads, token after token for all rows at once: weights and the cache."""
    matrices, head, keys = sizes(model)
    passes = max(max(group) for group in lengths)  # the prompts, then a token each
    cached = 0
    for prompt, group in zip(prompts, lengths):
        cached += prompt * (max(group) - 1) + sum(seen(0, length - 1) for length in group)
    return itemsize * (passes * (matrices + head) + 2 * keys * cached)


# --- what the machine can do -------------------------------------------------------------------


def product_ways(model, dtype, largest):
    """Matrix products to find the fastest of: (operations, function) each."""
    import torch

    from training.lean_layers import product

    shapes = [(size, size, size) for size in (largest // 2, largest)]
    layer = model.get_decoder().layers[0]
    for linear in (layer.self_attn.q_proj, layer.mlp.gate_proj, layer.mlp.down_proj):
        shapes += [(tokens, linear.in_features, linear.out_features) for tokens in (256, 2048)]
    ways = []
    for rows, width, columns in shapes:
        x = torch.randn(rows, width, device=model.device, dtype=dtype)
        weight = torch.randn(columns, width, device=model.device, dtype=dtype)
        transposed, operations = weight.T.contiguous(), 2 * x.numel() * columns
        ways.append((operations, lambda x=x, w=transposed: torch.matmul(x, w)))
        ways.append((operations, lambda x=x, w=weight: product(x, w)))
    return ways


def memory_ways(model, dtype, args):
    """Ways to read memory, or to read and write it: (bytes, function) each."""
    import torch

    count = args.megabytes * 2**20 // dtype.itemsize
    source = torch.ones(count, device=model.device, dtype=dtype).view(-1, 1024)
    target, vector = torch.empty_like(source), source[0].clone()
    return [
        (2 * source.nbytes, lambda: target.copy_(source)),
        (source.nbytes, lambda: torch.mv(source, vector)),
    ]


def rate(way, budget):
    """How much of (amount, function) is done per second, over `budget` seconds."""
    import torch

    amount, function = way
    function()
    calls, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < budget or not calls:
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        calls += 1
    return calls * amount / spent


if __name__ == "__main__":
    main()
