"""--sampler vllm: the training samples come from vLLM, a process of ours in its own environment.

vLLM pins another transformers, so it cannot be a library here. It could be found at a URL; but its
server speaks text by default, takes no weights but those in files that both can read, may be
another model's, and outlives the run. A process that we start has what we send it, at the version
that `--vllm_python` names, and ends with us.

Before a step is sampled the policy goes over (weights.py). Token ids go in and come out. Whatever
is wrong with an answer is a UserError before anything is trained on it: what comes back is held
against the policy's own log-probs.

Letters: Q questions, G completions per question, C completion tokens.
"""

import json
import math
import os
import signal
import socket
import subprocess
import weakref
from contextlib import suppress
from pathlib import Path

import torch

from grpo import completion_lengths
from sampling.rollouts import listed_rollouts, padding_and_stops
from sampling.weights import FOLDER, dtype_of, fingerprints, model_files, way_to
from training.logprobs import logprobs_without_gradient
from training.processes import everyones, from_main, patient
from training.progress import progress
from training.sharding import whole
from utils import Beside, UserError, mixed_seed

WORKER = Path(__file__).with_name("vllm_worker.py")
# Mean difference from the policy's own log-probs, in nats per token, above which the engine is
# taken to answer from other weights. Rounding makes 2e-6 of it in fp32, 0.05 in bf16, of SmolLM2.
TOLERANCE = {"fp32": 5e-3, "bf16": 0.1, "fp16": 0.05}
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # for draws that depend on their seeds alone
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
CACHE_GIB = "2"  # on a CPU, of keys and values; VLLM_CPU_KVCACHE_SPACE says otherwise
# What torchrun and accelerate tell their processes, by which vLLM would take itself for one.
LAUNCHERS = (
    "RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_",
    "FSDP_",
)  # fmt: skip


class Engine:
    """vLLM in a process of its own: see vllm_worker.py, which answers."""

    def __init__(self, python, devices, seconds, log):
        self.seconds, self.log = seconds, log
        self.holds = None  # the fingerprints of the weights that it was sent last
        self.way = None  # that weights take to it, see weights.py
        ours, theirs = socket.socketpair()
        with theirs, open(log, "ab") as file:
            try:
                self.process = subprocess.Popen(
                    [python, "-I", WORKER, str(theirs.fileno())], pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment(devices),
                    start_new_session=True,  # Ctrl-C is for the run
                )  # fmt: skip
            except OSError as error:
                raise UserError(f"--vllm_python {python}: {error.strerror}") from None
        ours.settimeout(seconds)
        self.channel, self.lines = ours, ours.makefile("rb")
        self.groups = []  # the process group that weights.py makes of it and us, if any
        self.end = weakref.finalize(self, end, self.process, self.groups)

    def ask(self, what, meanwhile=None, **arguments):
        """Its answer. Raises UserError, and ends it, where it gives none.

        meanwhile(): our side of what it does for that, in a thread, so that an engine which ends or
        hangs in the middle is told like any other.
        """
        side = None
        try:
            self.channel.sendall(json.dumps([what, arguments]).encode() + b"\n")
            side = meanwhile and Beside(self._ours, meanwhile)
            line = self.lines.readline()
            answer = json.loads(line) if line else {"error": self._how_it_ended()}
        except TimeoutError:
            answer = {"error": f"no answer within --vllm_timeout {self.seconds:g} seconds"}
        except OSError:
            answer = {"error": self._how_it_ended()}
        except ValueError:
            answer = {"error": "what it says is no JSON"}
        if side:  # which with NCCL may wait for a dead one without end
            side.join(5 if isinstance(answer, dict) else None)
            if side.value is not None:
                answer = {"error": f"{type(side.value).__name__}: {side.value}"}
        if isinstance(answer, dict):
            self.end()
            raise UserError(f"--sampler vllm: {what}: {' '.join(answer['error'].split())[:90]}; "
                            f"see {self.log}, then --resume")  # fmt: skip
        return answer

    def _ours(self, function):
        """The error for which our side failed, None where it was that the engine had ended. If it
        has not, it waits for us: so it is ended."""
        try:
            function()
        except Exception as error:
            try:
                self.process.wait(2)
            except subprocess.TimeoutExpired:
                self.end()
                return error

    def _how_it_ended(self):
        with suppress(subprocess.TimeoutExpired):
            status = self.process.wait(5)
            how = f"by signal {-status}" if status < 0 else f"with exit status {status}"
            return f"the engine ended {how}"
        return "the engine closed its end"


def end(process, groups):
    """End a process and those that it has started, and what they and we had begun on a GPU."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    while groups:
        groups.pop().abort()  # else a broadcast would keep all that comes after it waiting


def environment(devices):
    """The engine's environment variables. devices: the GPUs that it sees, None for ours."""
    kept = {name: x for name, x in os.environ.items() if not name.startswith(LAUNCHERS)}
    kept.setdefault("VLLM_CPU_KVCACHE_SPACE", CACHE_GIB)
    gpus = {} if devices is None else {"CUDA_VISIBLE_DEVICES": devices}
    return {**kept, **SETTINGS, **gpus, "OMP_NUM_THREADS": str(torch.get_num_threads())}


def start_engine(policy, args, accelerator, describe):
    """The Engine of a run, without weights yet; None where --sampler is another, and in all
    processes but the main one.

    describe(folder): makes what save_pretrained wrote there readable for transformers of any
    version. Raises UserError where it does not start, or has another vocabulary than the policy.
    """
    if args.sampler != "vllm":
        return None
    place = os.environ.get(FOLDER)
    if place and not (os.path.isdir(place) and os.access(place, os.W_OK)):
        raise UserError(f"{FOLDER}={place}: no directory to write to; name one that vLLM sees too, "
                        "or leave it unset")  # fmt: skip
    if args.vllm_transfer == "ipc" and policy.device.type == "cpu":
        raise UserError("--vllm_transfer ipc: is for a GPU, and there is none; use file")
    with patient(accelerator):
        engine = None
        if accelerator.is_main_process:
            log = Path(args.output_dir) / "vllm.log"
            engine = Engine(args.vllm_python, args.vllm_devices, args.vllm_timeout, log)
            with progress.shown("starting vLLM"), model_files(policy, args) as folder:
                describe(Path(folder))
                vocabulary = engine.ask("load", settings=settings(folder, args, policy.device))
            known = policy.get_input_embeddings().num_embeddings
            if vocabulary != known:
                engine.end()
                raise UserError(f"--sampler vllm: it has {vocabulary} tokens, --model_name "
                                f"{known}; it does not know this model")  # fmt: skip
            engine.way = way_to(engine, args, policy.device)
        accelerator.wait_for_everyone()
    return engine


def settings(folder, args, device):
    """Arguments of vLLM's LLM; those of --vllm_arguments come last."""
    on_cpu = device.type == "cpu"
    return {
        "model": folder,
        "dtype": str(dtype_of(args)).removeprefix("torch."),
        "max_model_len": args.max_prompt_length + args.max_completion_length,
        "enforce_eager": on_cpu,  # compiling takes minutes there
        "enable_chunked_prefill": not on_cpu,  # vLLM 0.32 fails there where a draw has a seed
        "seed": 0,
        **args.vllm_arguments,
    }


def sample_rollouts_vllm(setup, prompts, group_size, seeds):
    """`group_size` completions for every prompt from the policy as it is now, without
    filters, as Rollouts. Each is drawn from a seed of its own.

    The main process's engine answers all processes' prompts.
    """
    args, accelerator, policy = setup.args, setup.accelerator, setup.policy
    ends = padding_and_stops(policy, setup.tokenizer)
    parts = everyones([*zip(prompts, seeds)], accelerator)
    asked = [one for part in parts for one in part]
    rows = [(ids, mixed_seed(seed, g)) for ids, seed in asked for g in range(group_size)]

    def send():
        setup.engine.way(setup.engine, policy, args)
        setup.engine.holds = now

    def draw():
        return setup.engine.ask(
            "sample", prompts=[ids for ids, _ in rows], seeds=[seed for _, seed in rows],
            stops=ends[1], max_tokens=args.max_completion_length, temperature=args.temperature,
        )  # fmt: skip

    # A step's first draw is after an update; --max_draws may ask for more of the same weights.
    now = everyones(fingerprints(policy), accelerator) if args.max_draws > 1 else None
    with patient(accelerator):  # the engine's own limit is --vllm_timeout
        if now is None or from_main(lambda: setup.engine.holds != now, accelerator):
            with whole(policy):  # while they go over alone
                from_main(send, accelerator)
        completions = from_main(draw, accelerator)
    check_completions(completions, len(rows), policy, args.max_completion_length)

    def rollouts(first, last):  # of these questions
        return listed_rollouts(
            setup.tokenizer, [ids for ids, _ in asked[first:last]], group_size,
            completions[first * group_size : last * group_size], ends, policy.device,
        )  # fmt: skip

    check_agreement(setup, rollouts(0, 1))
    before = sum(map(len, parts[: accelerator.process_index]))
    return rollouts(before, before + len(prompts))


def check_completions(completions, count, policy, most):
    """Raise UserError where these are not `count` completions of at most `most` tokens."""
    known = policy.get_input_embeddings().num_embeddings

    def is_one(ids, logprobs):
        return (
            0 < len(ids) == len(logprobs) <= most
            and all(isinstance(token, int) and 0 <= token < known for token in ids)
            and all(isinstance(value, float) and -math.inf < value <= 0 for value in logprobs)
        )

    try:
        fine = len(completions) == count and all(is_one(*one) for one in completions)
    except TypeError:
        fine = False
    if not fine:
        raise UserError("--sampler vllm: its answer is not the completions that it was asked for; "
                        "see vllm.log, then --resume")  # fmt: skip


def check_agreement(setup, rollouts):
    """Raise UserError where the engine's log-probs of these Rollouts are not the policy's: it holds
    other weights, or does not know the model as we do.

    What came of an update within TOLERANCE is not seen; that grows, and then it is.
    """
    args, mask = setup.args, rollouts.completion_mask.flatten(0, 1)  # (R, C)
    lengths = completion_lengths(rollouts.completion_mask).tolist()
    with torch.no_grad(), setup.accelerator.autocast():
        ours = logprobs_without_gradient(
            setup.policy, rollouts.prompt_ids, lengths, rollouts.completion_ids.flatten(0, 1), args
        )  # (R, C)
    off = (ours - rollouts.logprobs.flatten(0, 1)).abs()[mask].mean().item()
    if not off <= TOLERANCE[args.precision]:
        raise UserError(f"--sampler vllm: its log-probs are {off:.2g} nats per token off the "
                        "policy's: it answers from other weights, or reads the model otherwise; "
                        "--resume starts it anew")  # fmt: skip
