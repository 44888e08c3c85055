"""Our sampler against transformers' `generate` on the same prompts, in turn in one run.

`generate` gets what a user would give it: every question repeated G times in one left-padded batch,
sampling at the same temperature with every filter off, in a plain process. Ours runs as main.py
runs it, with the allocator of utils.keep_freed_memory; `--same_allocator` gives it to both. Each
has a process of its own and works while the other waits. Both run the same weights on the same
device and dtype; tokens count up to and including the stop token.

    python benchmarks/sampling_vs_generate.py --dataset_path DIR_WITH_GSM8K --questions 4

The last line is JSON: median tokens per second of both, and the ratio with its range over rounds.
"""

import json
import sys
import time

from common import (
    Worker,
    load_questions,
    median,
    ratios,
    reply_channel,
    take_turns,
    workload_parser,
)


def main():
    parser = workload_parser(__doc__, rounds=3, warm_up=2)
    parser.add_argument("--same_allocator", action="store_true")
    args = parser.parse_args()
    if args.worker:
        return work(args)

    def show(reply):
        tokens, seconds = reply
        return f"{tokens:6} tokens {seconds:7.1f} s {tokens / seconds:7.1f} tokens/s"

    workers = [Worker(__file__, sys.argv[1:], name) for name in ("ours", "generate")]
    replies = take_turns(workers, args, show)
    rates = {name: [tokens / seconds for tokens, seconds in of] for name, of in replies.items()}
    print(json.dumps({
        "rows": args.questions * args.group_size,
        "ours_tokens_per_second": median(rates["ours"], 1),
        "generate_tokens_per_second": median(rates["generate"], 1),
        **ratios(rates["ours"], rates["generate"]),
    }))  # fmt: skip


def work(args):
    """One worker: for every seed on standard input, sample once and reply [tokens, seconds]."""
    reply = reply_channel()
    if args.worker == "ours" or args.same_allocator:
        from utils import keep_freed_memory

        keep_freed_memory()
    import torch

    from llms import chat_prompt, load_model
    from rldatasets import SYSTEM_PROMPT

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(args.model_name, device)
    problems = load_questions(args).batch(0, args.questions)
    prompts = [chat_prompt(tokenizer, SYSTEM_PROMPT, problem.question) for problem in problems]
    reply(f"{min(map(len, prompts))}-{max(map(len, prompts))} prompt tokens, "
          f"{torch.get_num_threads()} threads, {device}")  # fmt: skip
    sample = {"ours": ours, "generate": theirs}[args.worker]
    for line in sys.stdin:
        started = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"), torch.no_grad():
            tokens = sample(model, tokenizer, prompts, args, int(line))  # ends in a host copy
        reply([tokens, time.perf_counter() - started])


def ours(model, tokenizer, prompts, args, seed):
    from sampling.groups import sample_rollouts

    seeds = [seed + i for i in range(len(prompts))]
    rollouts = sample_rollouts(
        model, tokenizer, prompts, args.group_size, args.max_completion_length, args.temperature,
        seeds,
    )  # fmt: skip
    return int(rollouts.completion_mask.sum())


def theirs(model, tokenizer, prompts, args, seed):
    import torch

    from llms import stop_token_ids
    from sampling.decoder import left_padded

    torch.manual_seed(seed)
    repeated = [prompt for prompt in prompts for _ in range(args.group_size)]
    ids, mask = left_padded(repeated, model.device)
    stops = stop_token_ids(model, tokenizer)
    output = model.generate(
        ids, attention_mask=mask.long(), max_new_tokens=args.max_completion_length, do_sample=True,
        temperature=args.temperature, top_k=0, top_p=1.0, repetition_penalty=1.0,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=stops,
    )[:, ids.shape[1] :]  # fmt: skip
    stopped = torch.isin(output, torch.tensor(stops, device=output.device)).cumsum(-1)
    return int(((stopped - stopped.diff(dim=-1, prepend=stopped[:, :1] * 0)) == 0).sum())


if __name__ == "__main__":
    main()
