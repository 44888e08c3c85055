"""Presets: sets of defaults, one dict each. A flag on the command line wins over them."""

from utils import EMBEDDED_MODEL

LORA_TARGETS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
)  # fmt: skip

FUSED_TARGETS = ("qkv_proj", "gate_up_proj")  # what Phi-3 has instead

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
        "short_eval_iterations": 0,
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
        "micro_batch_tokens": 800,
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
        "short_eval_iterations": 4,
        "eval_problems": 512,
        "eval_batch_size": 128,
        "save_steps": 0,
    },
}
# Games have few positions and short moves, which are sampled and trained once where they are equal.
# These are those that held, see docs/self_play.md.
KUHN = {
    "questions_per_step": 96,
    "sampling_batch_size": 0,
    "micro_batch_tokens": 4096,
    "max_completion_length": 8,
    "temperature": 1.0,
    "num_train_iters": 20,
    "learning_rate": 2e-6,
    "lr_schedule": "constant",
    "kl_beta": 0.5,  # chips per nat; the reference plays all moves alike
    "cold_start_steps": 20,
    "cold_start_learning_rate": 5e-5,
    "cold_start_schedule": "linear",
    "advantage_scale": "none",
    "eval_problems": 0,
    "eval_iterations": 10,
    "short_eval_iterations": 0,  # an eighth of a few positions says nothing
}
A_GAME = "a game of one's own"  # whose moves may be longer
OWN_GAME = {name: value for name, value in KUHN.items() if name != "max_completion_length"}
# The referee takes most of the time.
TELL = {
    "questions_per_step": 4,
    "max_completion_length": 32,
    "temperature": 0.8,
    "num_train_iters": 12,
    "eval_problems": 256,
}
# A referee is taught by supervised steps alone; --num_train_iters adds GRPO.
JUDGING = {
    "max_completion_length": 4,
    "temperature": 1.0,
    "num_train_iters": 0,
    "cold_start_steps": 24,
    "cold_start_learning_rate": 3e-5,
    "cold_start_schedule": "linear",
    "eval_problems": 0,
    "short_eval_iterations": 0,
}
# What a preset changes for a dataset.
PRESETS_ON = {
    # 8 questions, no KL and 20 steps ended 12 points lower, see docs/results.md.
    ("cpu", "arithmetic"): {
        "questions_per_step": 16,
        "kl_beta": 0.04,
        "skip_flat_groups": True,
        "num_train_iters": 32,
        "learning_rate": 1.6e-5,
        "short_eval_iterations": 9,
    },
    ("cpu", "gsm8k"): {"max_completion_length": 160, "temperature": 1.0},
    ("cpu", "countdown"): {"max_completion_length": 96, "temperature": 1.0},
    ("cpu", "calculator"): {"max_completion_length": 96, "temperature": 1.0},
    ("cpu", "math"): {"max_completion_length": 256, "temperature": 1.0},
    ("cpu", "tell"): TELL,
    ("cpu", "debate"): {"max_completion_length": 48, "temperature": 1.0, "eval_problems": 256},
    # Those of docs/vision.md. Completions are short, and many of a group are equal.
    ("cpu", "shapes"): {
        "questions_per_step": 16,
        "max_completion_length": 56,
        "temperature": 1.0,
        "num_train_iters": 40,
        "learning_rate": 2e-5,
        "cold_start_learning_rate": 1e-4,
        "short_eval_iterations": 20,
    },
    ("cpu", "judging"): JUDGING,
    ("cpu", "reasoning_gym"): {"max_completion_length": 160, "temperature": 1.0},
    ("cpu", "kuhn"): KUHN,
    ("cpu", "nim"): KUHN,
    ("cpu", A_GAME): OWN_GAME,
}
