"""Our sampler against transformers' `generate` on the same prompts, in turn in one process.

`generate` gets what a user would give it: every question repeated G times in one left-padded batch,
sampling at the same temperature with every filter off. Both run the same weights on the same
device; tokens count up to and including the stop token. One round is one call of each.

    python benchmarks/sampling_vs_generate.py --dataset_path DIR_WITH_GSM8K --questions 4

The last line is JSON: median tokens per second of both, and the ratio with its range over rounds.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import keep_freed_memory

keep_freed_memory()

import torch

from llms import chat_prompt, load_model, stop_token_ids
from rldatasets import SYSTEM_PROMPT, load_problems
from sampler import left_padded, sample_rollouts


def ours(model, tokenizer, prompts, args, seed):
    generator = torch.Generator(model.device).manual_seed(seed)
    rollouts = sample_rollouts(
        model, tokenizer, prompts, args.group_size, args.max_new_tokens, args.temperature, generator
    )
    return int(rollouts.completion_mask.sum())


@torch.no_grad()
def theirs(model, tokenizer, prompts, args, seed):
    torch.manual_seed(seed)
    repeated = [prompt for prompt in prompts for _ in range(args.group_size)]
    ids, mask = left_padded(repeated, model.device)
    output = model.generate(
        ids, attention_mask=mask.long(), max_new_tokens=args.max_new_tokens, do_sample=True,
        temperature=args.temperature, top_k=0, top_p=1.0, repetition_penalty=1.0,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=stop_token_ids(model, tokenizer),
    )[:, ids.shape[1] :]  # fmt: skip
    stops = torch.tensor(stop_token_ids(model, tokenizer), device=output.device)
    stopped = torch.isin(output, stops).cumsum(-1)
    return int(((stopped == 0) | ((stopped == 1) & torch.isin(output, stops))).sum())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name", default="smollm2-135m")
    parser.add_argument("--dataset_path", help="GSM8K's directory; default: generated problems")
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--group_size", type=int, default=8)
    parser.add_argument("--max_new_tokens", type=int, default=160)
    parser.add_argument("--temperature", type=float, default=0.9)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(args.model_name, device)
    name = "gsm8k" if args.dataset_path else "arithmetic"
    problems = load_problems(name, args.dataset_path, "train", 0).batch(0, args.questions)
    prompts = [chat_prompt(tokenizer, SYSTEM_PROMPT, problem.question) for problem in problems]
    print(
        f"{len(prompts)} prompts of {min(map(len, prompts))}-{max(map(len, prompts))} tokens, "
        f"{args.questions * args.group_size} rows, {torch.get_num_threads()} threads, {device}"
    )

    rates = {"ours": [], "generate": []}
    for round_number in range(-1, args.rounds):  # round -1 warms up and is not counted
        for label, sample in (("ours", ours), ("generate", theirs)):
            started = time.perf_counter()
            tokens = sample(model, tokenizer, prompts, args, round_number + 1)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
            if round_number >= 0:
                rates[label].append(tokens / seconds)
            print(f"round {round_number}: {label:8} {tokens:6} tokens {seconds:7.1f} s "
                  f"{tokens / seconds:7.1f} tokens/s", flush=True)  # fmt: skip
    ratios = [a / b for a, b in zip(rates["ours"], rates["generate"])]
    print(json.dumps({
        "rows": args.questions * args.group_size,
        "ours_tokens_per_second": round(statistics.median(rates["ours"]), 1),
        "generate_tokens_per_second": round(statistics.median(rates["generate"]), 1),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_min": round(min(ratios), 2),
        "ratio_max": round(max(ratios), 2),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
