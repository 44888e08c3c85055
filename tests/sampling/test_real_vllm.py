"""vLLM itself as the sampler. Not in the default suite: it takes minutes, and VLLM_PYTHON has to
name the Python of an environment that has it, such as that of `make demo-vllm`:

    VLLM_PYTHON=.venv-vllm/bin/python python -m pytest -n 0 -m slow tests/sampling/test_real_vllm.py
"""

import os

import pytest
import torch
from conftest import make_args, make_model
from toys import engine_setup, naive

from records.exports import write_for_others
from sampling.engine import sample_rollouts_vllm
from training.lora import add_adapter, trained_parameters
from utils import UserError

PYTHON = os.environ.get("VLLM_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="VLLM_PYTHON names no Python with vLLM"),
]
SEEDS = [11, 12]


def prompts():
    """Two that begin with the same 128 tokens, a block of the prefix cache on a CPU, and go on for
    so long that those of all rows are more than vLLM reads at once, 4,096 tokens."""
    generator = torch.Generator().manual_seed(1)
    shared, first, second = torch.randint(2, 300, (3, 128), generator=generator).tolist()
    return [[*shared, *first], [*shared, *second[:-5]]]


def started(model, accelerator, folder, **flags):
    return engine_setup(
        model, accelerator, PYTHON, write_for_others, output_dir=str(folder), vllm_timeout=300.0,
        max_prompt_length=300, max_completion_length=24, **flags,
    )  # fmt: skip


def moved(model):
    with torch.no_grad():
        for parameter in trained_parameters(model):
            parameter += 0.1 * parameter.std() * torch.randn_like(parameter) + 1e-3


@pytest.mark.parametrize(
    ("family", "tied", "rank", "way"),
    [
        ("qwen2", True, 0, "file"),
        ("llama", False, 0, "file"),
        ("qwen3", True, 4, "file"),
        ("qwen2", True, 0, "broadcast"),
        ("llama", False, 4, "broadcast"),
    ],
)
def test_its_samples_are_the_policy_s_before_and_after_updates(
    family, tied, rank, way, accelerator, tmp_path
):
    model = make_model(
        family, hidden_size=128, head_dim=32, tie_word_embeddings=tied, initializer_range=0.1
    )
    if rank:
        add_adapter(model, make_args(lora_rank=rank, precision="fp32"))
    setup = started(model, accelerator, tmp_path, temperature=0.7, vllm_transfer=way)
    seen = []
    for _ in range(3):
        first, again = (sample_rollouts_vllm(setup, prompts(), 20, SEEDS) for _ in range(2))
        assert torch.equal(first.completion_ids, again.completion_ids)
        for question in range(2):
            error = naive(model, first, question, 0.7) - first.logprobs[question]
            assert error[first.completion_mask[question]].abs().max() < 1e-4
        seen.append(first.texts)
        moved(model)
    assert seen[0] != seen[1] != seen[2]
    setup.engine.process.kill()
    with pytest.raises(UserError, match="the engine ended by signal 9"):
        sample_rollouts_vllm(setup, prompts(), 20, SEEDS)
