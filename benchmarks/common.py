"""What the benchmarks share: flags, workers that take turns, a step as main.py does it, memory.

Torch is imported inside functions: a worker has to choose its allocator first.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
OF_THE_PRESET = ("micro_batch_tokens", "sampling_batch_size")  # for memory; the result is the same


def workload_parser(doc, rounds, warm_up, questions=True):
    """The flags of every benchmark; `rounds` and `warm_up` are the defaults of these two."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    flag = parser.add_argument
    flag("--model_name", default="smollm2-135m")
    flag("--dataset_path", help="GSM8K's directory; default: generated problems")
    if questions:
        flag("--questions", type=int, default=4)
    flag("--group_size", type=int, default=8)
    flag("--max_completion_length", "--max_new_tokens", type=int, default=160)
    flag("--temperature", type=float, default=0.9)
    flag("--rounds", type=int, default=rounds)
    flag("--warm_up", type=int, default=warm_up, help="rounds before those that count: until then "
         "memory that was freed has not found its places")  # fmt: skip
    flag("--worker", help=argparse.SUPPRESS)
    return parser


def training_flags(parser):
    """What the benchmarks of a whole step take in addition."""
    parser.add_argument("--kl_beta", type=float, default=0.04)
    for name in OF_THE_PRESET:
        parser.add_argument(f"--{name}", type=int, help="ours; default: that of the preset")
    return parser


# --- workers -----------------------------------------------------------------------------------


class Worker:
    """A process that does a round when it is asked to, and waits otherwise."""

    def __init__(self, script, flags, name, python=sys.executable):
        self.name = name
        self.process = subprocess.Popen(
            [python, script, *map(str, flags), "--worker", name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def answer(self):
        """What the worker says next."""
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"worker {self.name}: ended with status {self.process.wait()}")
        return json.loads(line)

    def ask(self, number):
        """Do round `number`."""
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self):
        """Let the worker end."""
        self.process.stdin.close()
        self.process.wait()


def only_answer(script, flags, name):
    """What a worker says that answers once and ends."""
    worker = Worker(script, flags, name)
    answer = worker.answer()
    worker.close()
    return answer


def take_turns(workers, args, show):
    """Have Workers do round after round in turn.

    Returns {name: replies of the rounds that count}; `show` puts a reply into a line.
    """
    for worker in workers:
        print(f"{worker.name}: {worker.answer()}", flush=True)
    replies = {worker.name: [] for worker in workers}
    for number in range(args.warm_up + args.rounds):
        for worker in workers:
            reply = worker.ask(number)
            counts = number >= args.warm_up
            replies[worker.name] += [reply] * counts
            print(f"round {number}: {worker.name:8} {show(reply)}{'' if counts else '  (warm-up)'}",
                  flush=True)  # fmt: skip
    for worker in workers:
        worker.close()
    return replies


def reply_channel():
    """A function that sends a worker's replies. Whatever else is printed goes to standard error."""
    channel, sys.stdout = sys.stdout, sys.stderr
    return lambda reply: print(json.dumps(reply), file=channel, flush=True)


def median(values, digits):
    """The median, rounded for the last line."""
    return round(statistics.median(values), digits)


def ratios(ours, theirs, prefix=""):
    """Median and range, over rounds, of ours / theirs."""
    values = [a / b for a, b in zip(ours, theirs)]
    names = (f"{prefix}ratio", f"{prefix}ratio_min", f"{prefix}ratio_max")
    summary = (statistics.median(values), min(values), max(values))
    return {name: round(value, 2) for name, value in zip(names, summary)}


def span(result, prefix=""):
    """What `ratios` gave, as a table shows it."""
    return "{} ({}–{})".format(*(result[f"{prefix}ratio{end}"] for end in ("", "_min", "_max")))


# --- ours --------------------------------------------------------------------------------------


def load_questions(args):
    """The training problems; `.batch(round, questions)` are those of a round."""
    from rldatasets import load_problems

    name = "gsm8k" if args.dataset_path else "arithmetic"
    return load_problems(name, args.dataset_path, "train", 0)


def set_up(args, model_name, questions, mixed_precision=None, lora_rank=0):
    """What main.train has at hand when its loop begins. Mixed precision: as there, unless given."""
    import torch
    from accelerate import Accelerator

    from launch.parser import parse_args
    from llms import kl_reference, load_model, rendering_of
    from tasks import load_task
    from training.lora import add_adapter
    from training.optimizer import make_optimizer
    from training.progress import Stopwatch
    from training.setup import Setup

    on_gpu = torch.cuda.is_available()
    argv = {
        "preset": "h100" if on_gpu else "cpu",
        "model_name": model_name,
        "dataset_name": "gsm8k" if args.dataset_path else "arithmetic",
        "questions_per_step": questions,
        "group_size": args.group_size,
        "max_completion_length": args.max_completion_length,
        "temperature": args.temperature,
        "kl_beta": args.kl_beta,
        "learning_rate": 1e-6,
        "lr_schedule": "constant",
        "warmup_percent": 0,
        "max_grad_norm": 1,
        "lora_rank": lora_rank,
    }
    mixed_precision = mixed_precision or ("bf16" if on_gpu else "no")
    argv["precision"] = "fp32" if mixed_precision == "no" else mixed_precision
    if args.dataset_path:
        argv["dataset_path"] = args.dataset_path
    given = {name: getattr(args, name) for name in OF_THE_PRESET}
    argv |= {name: value for name, value in given.items() if value is not None}
    flags = parse_args([part for name, value in argv.items() for part in (f"--{name}", str(value))])
    flags.skip_flat_groups = False  # TRL and earlier commits train on them
    accelerator = Accelerator(cpu=not on_gpu, mixed_precision=mixed_precision)
    policy, tokenizer = load_model(model_name, accelerator.device, None, rendering_of(flags))
    add_adapter(policy, flags)
    reference = kl_reference(policy, flags, mixed_precision == "bf16")
    stopwatch = Stopwatch(torch.cuda.synchronize if on_gpu else None)
    setup = Setup(policy, tokenizer, load_task(flags), flags, accelerator, reference, stopwatch)
    return setup, *make_optimizer(policy, flags)


def our_step(setup, optimizer, scheduler, problems, number):
    """One step of main.train, without its files. Returns (rollouts, seconds per stage)."""
    from evaluation.scoring import score
    from grpo import group_advantages
    from sampling.groups import sample_groups
    from sampling.rollouts import without_thoughts
    from training.update import update_policy
    from utils import mixed_seed

    flags, stopwatch = setup.args, setup.stopwatch
    seeds = [mixed_seed(number, q) for q in range(len(problems))]
    with stopwatch("sampling"):
        rollouts = sample_groups(setup, problems, seeds)
    with stopwatch("rewards"):
        judged = without_thoughts(rollouts, setup)
        rewards = score(judged, problems, setup.task.reward_functions, flags.reward_weights)
        advantages = group_advantages(rewards.total, flags.advantage_scale)  # (Q, G)
    update_policy(setup, optimizer, rollouts, advantages)
    scheduler.step()
    return rollouts, stopwatch.lap()


def work_ours(args, lora_rank=0):
    """One worker: a step of ours for every round on standard input. Each reply is the number of
    tokens sampled, the seconds of sampling, of what follows the rewards (the update) and of all of
    it, and the process's peak of memory so far."""
    reply = reply_channel()
    from utils import keep_freed_memory

    keep_freed_memory()
    import torch

    from utils import parameters_of

    setup, optimizer, scheduler = set_up(args, args.model_name, args.questions, lora_rank=lora_rank)
    problems = load_questions(args)
    trained = sum(parameter.numel() for parameter in parameters_of(optimizer))
    reply(f"{torch.get_num_threads()} threads, {setup.accelerator.device}, "
          f"{setup.args.micro_batch_tokens or 'all'} tokens per micro-batch, {trained:,} weights "
          "trained")  # fmt: skip
    for line in sys.stdin:
        started = time.perf_counter()
        drawn = problems.batch(int(line), args.questions)
        rollouts, seconds = our_step(setup, optimizer, scheduler, drawn, int(line))
        step = time.perf_counter() - started
        torch.cuda.empty_cache()  # for the other's turn
        reply({
            "tokens": int(rollouts.completion_mask.sum()), "sampling": seconds["sampling"],
            "update": step - seconds["sampling"] - seconds["rewards"], "step": step,
            "peak_gib": peak_gib(),
        })  # fmt: skip


def save_model(name, folder):
    """The model's fp32 weights and tokenizer as files that both sides load."""
    from llms import load_model

    model, tokenizer = load_model(name, "cpu")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def peak_gib():
    """The most memory this process has held: on a GPU what torch allocated, else resident."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    # Not getrusage: its maximum goes on from that of the process that started this one.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


def table(rows):
    """Rows of cells as a Markdown table, the first being its head."""
    rows = [[str(cell) for cell in row] for row in rows]
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
