"""A GRPO step of ours against one of TRL's GRPOTrainer on the same work, in turn in one run.

Both train every completion of the same questions, with the same rewards, KL term, clip and AdamW,
from the same fp32 weights (bf16 autocast on CUDA); ours leaves out no flat group as long as
--kl_beta is above 0. TRL runs in a plain process as its users run it: loss_type grpo, no vLLM, all
completions generated in one batch, and without gradient checkpointing, which is on by default and
would cost it a forward pass; --trl NAME=VALUE ... changes any setting of its GRPOConfig. Its
use_bias_correction_kl, new and on by default, is another loss, and off here. Ours runs as main.py
runs it, with the allocator of utils.keep_freed_memory; --same_allocator gives it to TRL as well.
Each has a process of its own and works while the other waits.

First of all both do one step on the same completions, in fp32, with the policy moved away from the
weights that sampled: if loss or gradient differ by more than 1e-3, nothing is measured.

What is timed: a step is sampling, rewards, reference, policy and optimizer (TRL: from on_step_begin
to on_step_end). Sampling is ours from the questions to decoded texts, TRL's its `_generate`, which
is the same. Tokens count up to and including the stop token. Memory is the peak of a process over
the whole run: resident, or on CUDA what torch allocated.

    python benchmarks/vs_trl.py --dataset_path DIR_WITH_GSM8K

The last line is JSON: medians over rounds, ratios ours / TRL with their range over rounds.
"""

import json
import sys
import tempfile
import time
from dataclasses import asdict
from statistics import fmean

from common import (
    Worker,
    load_questions,
    median,
    only_answer,
    peak_gib,
    ratios,
    reply_channel,
    save_model,
    set_up,
    span,
    table,
    take_turns,
    training_flags,
    work_ours,
    workload_parser,
)

TOLERANCE = 1e-3  # of loss and gradient, relative
CHECKED_TOKENS = 64  # per completion, at most, in the comparison of the losses


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = training_flags(workload_parser(__doc__, rounds=3, warm_up=1))
    parser.add_argument("--trl_batch_size", type=int, default=8, help="per_device_train_batch_size")
    parser.add_argument("--trl", nargs="+", default=[], metavar="NAME=VALUE",
                        help="settings of GRPOConfig, the values in JSON")  # fmt: skip
    parser.add_argument("--same_allocator", action="store_true")
    args = parser.parse_args(argv)
    if args.worker:
        return {"loss": work_loss, "ours": work_ours, "trl": work_trl}[args.worker](args)
    if args.questions * args.group_size % args.trl_batch_size:
        parser.error(f"--trl_batch_size {args.trl_batch_size}: does not divide the step's "
                     f"{args.questions * args.group_size} completions")  # fmt: skip

    with tempfile.TemporaryDirectory() as folder:
        flags = [*argv, "--model_name", folder]  # of two, the last one counts
        save_model(args.model_name, folder)
        loss, loss_error, gradient_error = only_answer(__file__, flags, "loss")
        if not max(loss_error, gradient_error) < TOLERANCE:
            sys.exit(f"vs_trl.py: error: not the same loss: relative difference {loss_error:.1e}, "
                     f"of the gradient {gradient_error:.1e}")  # fmt: skip
        print(f"same loss {loss:.6f}, relative difference {loss_error:.1e}, of the gradient "
              f"{gradient_error:.1e}", flush=True)  # fmt: skip
        workers = [Worker(__file__, flags, name) for name in ("ours", "trl")]
        replies = take_turns(workers, args, show)
    print(json.dumps(summary(args, replies)))


def show(reply):
    rate = reply["tokens"] / reply["sampling"]
    return (f"{reply['tokens']:6} tokens, sampling {reply['sampling']:6.1f} s {rate:7.1f} tokens/s,"
            f" step {reply['step']:6.1f} s, peak {reply['peak_gib']:.2f} GiB")  # fmt: skip


def summary(args, replies):
    """Print the table; returns what goes into the last line."""
    completions = args.questions * args.group_size
    sampling, steps, peaks, lengths = {}, {}, {}, {}
    for name, rounds in replies.items():
        sampling[name] = [reply["tokens"] / reply["sampling"] for reply in rounds]
        steps[name] = [completions / reply["step"] for reply in rounds]
        peaks[name] = max(reply["peak_gib"] for reply in rounds)
        lengths[name] = fmean(reply["tokens"] / completions for reply in rounds)
    result = {"questions": args.questions, "group_size": args.group_size, "rounds": args.rounds}
    for name in replies:
        result |= {
            f"{name}_sampling_tokens_per_second": median(sampling[name], 1),
            f"{name}_completions_per_second": median(steps[name], 3),
            f"{name}_peak_gib": round(peaks[name], 2),
            f"{name}_completion_length": round(lengths[name], 1),
        }
    result |= ratios(sampling["ours"], sampling["trl"], "sampling_")
    result |= ratios(steps["ours"], steps["trl"], "step_")
    result["memory_ratio"] = round(peaks["ours"] / peaks["trl"], 2)

    def row(label, key, ratio):
        return label, result[f"ours_{key}"], result[f"trl_{key}"], ratio

    print(table([
        ("", "ours", "TRL", "ratio"),
        row("sampling, tokens/s", "sampling_tokens_per_second", span(result, "sampling_")),
        row("whole step, completions/s", "completions_per_second", span(result, "step_")),
        row("peak memory, GiB", "peak_gib", result["memory_ratio"]),
    ]))  # fmt: skip
    return result


# --- the same loss -----------------------------------------------------------------------------


def spread(completion, problem):
    """A reward that means nothing and makes completions differ, so that no advantage is 0."""
    return float(sum(map(ord, completion)) % 7)


def work_loss(args):
    """One worker, whose memory the others need: sends what compare_losses returns."""
    reply = reply_channel()
    reply(compare_losses(args, args.model_name))


def compare_losses(args, folder):
    """One step of both on the same completions: (our loss, difference, that of the gradient).

    The differences are relative. TRL's step is the whole of it but for the completions and their
    log-probs when sampled: its rewards, advantages, reference, micro-batches and loss. The policy
    is moved before the step, so that the KL matters; the ratio is 1 in both.
    """
    import torch
    from torch.optim.lr_scheduler import LambdaLR

    from evaluation.scoring import score
    from grpo import group_advantages
    from sampling.groups import sample_groups
    from training.update import update_policy

    class Catcher(torch.optim.SGD):
        """Keeps the gradient of the step instead of doing it."""

        def step(self, closure=None):
            self.gradients = [p.grad.clone() for g in self.param_groups for p in g["params"]]

    setup, _, _ = set_up(args, folder, args.questions, mixed_precision="no")
    torch.set_float32_matmul_precision("highest")
    setup.args.max_grad_norm = 0
    setup.args.max_completion_length = min(CHECKED_TOKENS, args.max_completion_length)
    problems = load_questions(args).batch(0, args.questions)
    rollouts = sample_groups(setup, problems, range(len(problems)))
    advantages = group_advantages(score(rollouts, problems, [spread]).total)  # (Q, G)
    generator = torch.Generator(setup.policy.device).manual_seed(0)
    with torch.no_grad():
        for p in setup.policy.parameters():
            noise = torch.empty_like(p).normal_(generator=generator)
            p += 0.03 * p.square().mean().sqrt() * noise
    catcher = Catcher(setup.policy.parameters(), lr=0.0)
    our_loss = update_policy(setup, catcher, rollouts, advantages)["loss"]

    def rollout(prompts, trainer):
        prompt_ids, _, _ = trainer._tokenize_prompts(prompts)
        expected = [ids.tolist() for ids in rollouts.prompt_ids for _ in range(args.group_size)]
        if prompt_ids != expected:
            sys.exit("vs_trl.py: error: TRL writes other prompts than we do")
        pairs = zip(rollouts.completion_mask.flatten(0, 1), rollouts.completion_ids.flatten(0, 1))
        logprobs = zip(rollouts.completion_mask.flatten(0, 1), rollouts.logprobs.flatten(0, 1))
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [ids[mask].tolist() for mask, ids in pairs],
            "logprobs": [values[mask].tolist() for mask, values in logprobs],
        }

    trainer = make_trainer(
        args, folder, problems, [spread], {"max_steps": 1, "max_grad_norm": 0.0, "bf16": False},
        rollout_func=rollout,
    )  # fmt: skip
    trainer.model.load_state_dict(setup.policy.state_dict())
    their_catcher = Catcher(trainer.model.parameters(), lr=0.0)
    trainer.optimizer = their_catcher
    trainer.lr_scheduler = LambdaLR(their_catcher, lambda step: 1.0)
    their_loss = trainer.train().training_loss

    def norm(tensors):
        return sum(tensor.double().square().sum() for tensor in tensors).sqrt().item()

    pairs = zip(catcher.gradients, their_catcher.gradients, strict=True)
    difference = norm([a - b for a, b in pairs]) / norm(catcher.gradients)
    return our_loss, abs(their_loss - our_loss) / abs(our_loss), difference


# --- workers -----------------------------------------------------------------------------------


def work_trl(args):
    """One worker: a step of TRL's for every round on standard input."""
    reply = reply_channel()
    if args.same_allocator:
        from utils import keep_freed_memory

        keep_freed_memory()
    import torch
    from transformers import TrainerCallback

    from evaluator import REWARD_FUNCTIONS

    rounds = args.warm_up + args.rounds
    questions = load_questions(args)
    problems = [p for number in range(rounds) for p in questions.batch(number, args.questions)]
    trainer = make_trainer(args, args.model_name, problems, REWARD_FUNCTIONS, {"max_steps": rounds})
    now = {}

    class Turns(TrainerCallback):
        def on_step_begin(self, *_, **__):
            if not sys.stdin.readline():
                sys.exit()
            now["begun"] = time.perf_counter()

        def on_step_end(self, *_, **__):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            step = time.perf_counter() - now["begun"]
            torch.cuda.empty_cache()  # for the other's turn
            reply({"tokens": now["tokens"], "sampling": now["sampling"], "step": step,
                   "peak_gib": peak_gib()})  # fmt: skip

    generate = trainer._generate

    def timed_generate(prompts):
        started = time.perf_counter()
        output = generate(prompts)  # prompt ids, completion ids as lists, ...
        now["sampling"] = time.perf_counter() - started
        now["tokens"] = sum(map(len, output[1]))
        return output

    trainer._generate = timed_generate
    trainer.add_callback(Turns())
    settings = trainer.args
    reply(f"{torch.get_num_threads()} threads, {settings.device}, "
          f"{settings.per_device_train_batch_size} completions per micro-batch, gradient "
          f"checkpointing {'on' if settings.gradient_checkpointing else 'off'}")  # fmt: skip
    trainer.train()


def make_trainer(args, folder, problems, reward_functions, settings, **more):
    """TRL's trainer for this work; `settings` and then --trl win over what stands here."""
    import torch
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    from rldatasets import SYSTEM_PROMPT, Problem

    def for_trl(function):
        def reward(completions, question, answer, solution, **_):
            return [
                function(message["content"], Problem(*fields))
                for [message], *fields in zip(completions, question, answer, solution)
            ]

        reward.__name__ = function.__name__
        return reward

    def messages(problem):
        contents = {"system": SYSTEM_PROMPT, "user": problem.question}
        return [{"role": role, "content": content} for role, content in contents.items()]

    on_gpu = torch.cuda.is_available()
    chosen = {
        "output_dir": folder,
        "per_device_train_batch_size": args.trl_batch_size,
        "gradient_accumulation_steps": args.questions * args.group_size // args.trl_batch_size,
        "num_generations": args.group_size,
        "max_completion_length": args.max_completion_length,
        "temperature": args.temperature,
        "top_k": 0,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
        "loss_type": "grpo",
        "scale_rewards": "group",
        "epsilon": 0.2,
        "num_iterations": 1,
        "beta": args.kl_beta,
        "use_bias_correction_kl": False,
        "mask_truncated_completions": False,
        "disable_dropout": True,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "bf16": on_gpu,
        "use_cpu": not on_gpu,
        "model_init_kwargs": {"dtype": "float32", "attn_implementation": "sdpa"},
        "shuffle_dataset": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        **settings,
    }
    for setting in args.trl:
        name, _, value = setting.partition("=")
        chosen[name] = json.loads(value)
    trainer = GRPOTrainer(
        model=folder,
        reward_funcs=[for_trl(function) for function in reward_functions],
        args=GRPOConfig(**chosen),
        train_dataset=Dataset.from_list([{"prompt": messages(p), **asdict(p)} for p in problems]),
        **more,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


if __name__ == "__main__":
    main()
