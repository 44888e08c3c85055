"""Tiny models and tokenizers, built in memory: the suite needs no network."""

import os
import runpy
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

# Read by triton as it is imported, by some of what follows: without a GPU it interprets kernels.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import utils
from evaluation import reward_lint
from launch.presets import LORA_TARGETS
from records import run as run_records
from tasks import load_task
from training.lean_layers import make_lean
from training.setup import Setup

ROOT = Path(__file__).resolve().parent.parent
CANARY = "hf_canary1234567890"  # an access token, which no output may hold
GSM8K = Path(os.environ.get("GSM8K_DIR", ROOT.parent / "shared" / "gsm8k"))
FAMILIES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}
FOUR_LAYERS = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 8,
    "head_dim": 16, "vocab_size": 500, "initializer_range": 0.02,
}  # fmt: skip

# The task of evaluator.py's rewards, on generated problems.
TASK = load_task(SimpleNamespace(
    dataset_name="arithmetic", dataset_path=None, difficulty=1, evaluator=None, seed=0
))  # fmt: skip

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_CHAT = (
    "{{ bos_token }}{% for message in messages %}<|start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SPECIAL = {
    "qwen2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama": ["<|begin|>", "<|end|>", "<|start|>", "<|eot|>"],
}


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def make_tokenizer(family="qwen2"):
    """A byte-level tokenizer (every byte a token, and "ab" as one) with the family's chat form."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*alphabet, "ab"])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL[family])
    if family == "qwen2":
        return PreTrainedTokenizerFast(
            tokenizer_object=core,
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            chat_template=CHATML,
        )
    # Like LLaMA-3: the tokenizer puts a BOS in front of any text, and so does the chat template.
    core.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", core.token_to_id("<|begin|>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|begin|>",
        eos_token="<|eot|>",
        pad_token="<|eot|>",
        chat_template=LLAMA_CHAT,
    )


def make_model(family="qwen2", dtype=torch.float32, vocab_size=300, seed=0, **overrides):
    """A random two-layer model whose distributions are far from uniform."""
    config_class, model_class = FAMILIES[family]
    settings = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 1024,
        "initializer_range": 0.3,
        "eos_token_id": None,
        "bos_token_id": None,
        "pad_token_id": None,
        "tie_word_embeddings": True,
    }
    config = config_class(**{**settings, **overrides}, attn_implementation="sdpa")
    torch.manual_seed(seed)
    model = model_class(config).to(dtype).eval()
    if dtype == torch.float64:  # where transformers' own norms round to fp32
        make_lean(model)
    return model


def make_args(**overrides):
    """The flags that the functions of a step and of an evaluation read, at plain values."""
    args = {
        "seed": 0,
        "output_dir": "no folder yet",
        "questions_per_step": 3,
        "group_size": 4,
        "sampling_batch_size": 0,
        "precision": "auto",
        "sampler": "shared_prefix",
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "max_draws": 1,
        "skip_flat_groups": False,
        "overlong_buffer": 0,
        "reward_weights": {},
        "reward_timeout": None,
        "referee": None,
        "referee_url": None,
        "referee_model": None,
        "eval_referee": None,
        "referee_pairs": 0,
        "referee_anyway": False,
        "eval_batch_size": 8,
        "eval_samples": 0,
        "temperature": 1.0,
        "stop": [],
        "aggregation": "grpo",
        "max_completion_length": 16,
        "ratio": "token",
        "clip": "ppo",
        "clip_delta": 0.0,
        "tis_cap": 0.0,
        "tis_floor": 0.0,
        "tis_form": "token_truncate",
        "entropy_bonus": 0.0,
        "entropy_target": 0.0,
        "top_entropy": 1.0,
        "weights_dtype": "float32",
        "lora_rank": 0,
        "lora_alpha": 32.0,
        "lora_targets": [*LORA_TARGETS],
        "merge_lora": False,
        "update_ref_model": False,
        "cold_start_steps": 0,
        "cold_start_learning_rate": 1e-3,
        "cold_start_schedule": "constant",
        "model_name": "toy",
        "image_tokens": 256,
        "mask_truncated": False,
        "rebuttals": 0,
        "micro_batch_tokens": 0,
        "num_inner_epochs": 1,
        "clip_epsilon": 0.2,
        "clip_epsilon_high": 0.2,
        "kl_beta": 0.0,
        "kl_estimator": "k3",
        "max_grad_norm": 0.0,
        "learning_rate": 1e-3,
        "lr_schedule": "constant",
        "warmup_percent": 0.0,
        "num_train_iters": 10,
        "weight_decay": 0.1,
        "adam_beta1": 0.9,
        "adam_beta2": 0.99,
    }
    return SimpleNamespace(**{**args, **overrides})


def make_setup(model, args=None, accelerator=None, tokenizer=None, task=TASK, reference=None):
    """What a run with this model is made of; by default with plain flags and on the CPU."""
    return Setup(
        model, tokenizer, task, args or make_args(), accelerator or Accelerator(cpu=True), reference
    )


@pytest.fixture(autouse=True)
def on_the_cpu_unless_marked_gpu(request, monkeypatch):
    """The suite says the same on a machine with a GPU or AMX; every test sets up accelerate
    afresh."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # for the commands that tests start


@pytest.fixture(autouse=True)
def lint_without_its_megabytes(request, monkeypatch):
    """Every run starts with the lint; only its own tests wait for its quarter of a second."""
    if not request.node.get_closest_marker("megabytes"):
        monkeypatch.setattr(reward_lint, "UNITS", ())


@pytest.fixture(autouse=True)
def runs_without_their_figures(request, monkeypatch):
    """A run's thirty PNGs take longer than all else about a toy; their own tests draw them."""
    if not request.node.get_closest_marker("figures"):
        monkeypatch.setattr(run_records, "plot_run", lambda path: Path(path) / "plots")


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def command(monkeypatch, capfd):
    """Runs main.py in this process as `python main.py FLAGS` would, less the seconds of its
    imports. Returns (exit status, stdout, stderr)."""
    monkeypatch.setenv("HF_TOKEN", CANARY)
    # It would hold for all tests. The door, imported anew below, imports it by name.
    monkeypatch.setattr(utils, "keep_freed_memory", lambda: None)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["main.py", *map(str, argv)])
        monkeypatch.delitem(sys.modules, "launch.door", raising=False)
        status = 0
        try:
            runpy.run_path(str(ROOT / "main.py"), run_name="__main__")
        except SystemExit as stop:
            status = stop.code
        return status, *capfd.readouterr()

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def gsm8k():
    if not (GSM8K / "train.jsonl").exists():
        pytest.skip(f"GSM8K's train.jsonl and test.jsonl are not at {GSM8K}; set GSM8K_DIR")
    return GSM8K


@pytest.fixture(scope="session")
def saved_models(tmp_path_factory):
    """Directories of a tiny Qwen2 and a tiny LLaMA, as save_pretrained leaves them."""
    folders = {}
    for family in ("qwen2", "llama"):
        tokenizer = make_tokenizer(family)
        model = make_model(family, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
        folders[family] = tmp_path_factory.mktemp(family)
        model.save_pretrained(folders[family])
        tokenizer.save_pretrained(folders[family])
    return folders


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory):
    """A Qwen2 and a directory that holds its configuration and nothing else."""
    folder = tmp_path_factory.mktemp("four_layers")
    model = make_model(**FOUR_LAYERS)
    model.config.save_pretrained(folder)
    return model, str(folder)


# --- --sampler vllm, with tests/stub_vllm.py in vLLM's place -------------------------------------


@pytest.fixture
def python(tmp_path, monkeypatch):
    """A program that stands for the Python of vLLM's environment."""
    monkeypatch.setenv("STUB_WORKER", str(ROOT / "sampling" / "vllm_worker.py"))
    program = tmp_path / "python"
    program.write_text(f"#!{sys.executable}\n" + (ROOT / "tests" / "stub_vllm.py").read_text())
    program.chmod(0o755)
    return str(program)


@pytest.fixture
def setup_with(python, tmp_path, accelerator):
    """A Setup whose engine is the stub, that many tokens per completion."""
    from toys import engine_setup, without_layers  # which import this

    def started(model=None, python=python, **flags):
        model = without_layers() if model is None else model
        return engine_setup(
            model, accelerator, python, output_dir=str(tmp_path), vllm_timeout=20.0,
            max_prompt_length=8, max_completion_length=12, **flags,
        )  # fmt: skip

    return started
