"""Our sampler against transformers' `generate` on the same prompts, in turn in one run.

`generate` gets what a user would give it: every question repeated G times in one left-padded batch,
sampling at the same temperature with every filter off, in a plain process. Ours runs as main.py
runs it, with the allocator of utils.keep_freed_memory; `--same_allocator` gives it to both. Each
has a process of its own and works while the other waits. Both run the same weights on the same
device and dtype; tokens count up to and including the stop token.

    python benchmarks/sampling_vs_generate.py --dataset_path DIR_WITH_GSM8K --questions 4

The last line is JSON: median tokens per second of both, and the ratio with its range over rounds.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

WARM_UP = 2  # rounds that do not count: until then memory that was freed has not found its places


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name", default="smollm2-135m")
    parser.add_argument("--dataset_path", help="GSM8K's directory; default: generated problems")
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--group_size", type=int, default=8)
    parser.add_argument("--max_new_tokens", type=int, default=160)
    parser.add_argument("--temperature", type=float, default=0.9)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--same_allocator", action="store_true")
    parser.add_argument("--worker", choices=("ours", "generate"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args)

    command = [sys.executable, __file__, *sys.argv[1:], "--worker"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = {name: subprocess.Popen([*command, name], **pipes) for name in ("ours", "generate")}
    for worker in workers.values():
        print(worker.stdout.readline().strip(), flush=True)
    rates = {name: [] for name in workers}
    for seed in range(WARM_UP + args.rounds):
        for name, worker in workers.items():
            worker.stdin.write(f"{seed}\n")
            worker.stdin.flush()
            tokens, seconds = json.loads(worker.stdout.readline())
            if seed >= WARM_UP:
                rates[name].append(tokens / seconds)
            print(f"round {seed}: {name:8} {tokens:6} tokens {seconds:7.1f} s "
                  f"{tokens / seconds:7.1f} tokens/s", flush=True)  # fmt: skip
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    ratios = [a / b for a, b in zip(rates["ours"], rates["generate"])]
    print(json.dumps({
        "rows": args.questions * args.group_size,
        "ours_tokens_per_second": round(statistics.median(rates["ours"]), 1),
        "generate_tokens_per_second": round(statistics.median(rates["generate"]), 1),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_min": round(min(ratios), 2),
        "ratio_max": round(max(ratios), 2),
    }))  # fmt: skip


def work(args):
    """One worker: for every seed on standard input, sample once and print [tokens, seconds]."""
    if args.worker == "ours" or args.same_allocator:
        from utils import keep_freed_memory

        keep_freed_memory()
    import torch

    from llms import chat_prompt, load_model
    from rldatasets import SYSTEM_PROMPT, load_problems

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(args.model_name, device)
    name = "gsm8k" if args.dataset_path else "arithmetic"
    problems = load_problems(name, args.dataset_path, "train", 0).batch(0, args.questions)
    prompts = [chat_prompt(tokenizer, SYSTEM_PROMPT, problem.question) for problem in problems]
    print(f"{args.worker}: {min(map(len, prompts))}-{max(map(len, prompts))} prompt tokens, "
          f"{torch.get_num_threads()} threads, {device}", flush=True)  # fmt: skip
    sample = {"ours": ours, "generate": theirs}[args.worker]
    for line in sys.stdin:
        started = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"), torch.no_grad():
            tokens = sample(model, tokenizer, prompts, args, int(line))  # ends in a host copy
        print(json.dumps([tokens, time.perf_counter() - started]), flush=True)


def ours(model, tokenizer, prompts, args, seed):
    import torch

    from sampler import sample_rollouts

    generator = torch.Generator(model.device).manual_seed(seed)
    rollouts = sample_rollouts(
        model, tokenizer, prompts, args.group_size, args.max_new_tokens, args.temperature, generator
    )
    return int(rollouts.completion_mask.sum())


def theirs(model, tokenizer, prompts, args, seed):
    import torch

    from decoder import left_padded
    from llms import stop_token_ids

    torch.manual_seed(seed)
    repeated = [prompt for prompt in prompts for _ in range(args.group_size)]
    ids, mask = left_padded(repeated, model.device)
    stops = stop_token_ids(model, tokenizer)
    output = model.generate(
        ids, attention_mask=mask.long(), max_new_tokens=args.max_new_tokens, do_sample=True,
        temperature=args.temperature, top_k=0, top_p=1.0, repetition_penalty=1.0,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=stops,
    )[:, ids.shape[1] :]  # fmt: skip
    stopped = torch.isin(output, torch.tensor(stops, device=output.device)).cumsum(-1)
    return int(((stopped - stopped.diff(dim=-1, prepend=stopped[:, :1] * 0)) == 0).sum())


if __name__ == "__main__":
    main()
