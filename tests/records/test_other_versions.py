"""What a run exports is read by transformers 4.57 as it was meant. It takes minutes, for pip fills
an environment of its own:

    python -m pytest -n 0 -m other_versions tests/records/test_other_versions.py
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from test_exports import IDS, LLAMA3, saved

OTHER = ("torch==2.13.0", "transformers==4.57.1")
ROPES = {
    "qwen2": {"rope_type": "default", "rope_theta": 1e6},
    "llama": {**LLAMA3, "rope_theta": 5e5},
    "qwen3": {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64,
              "rope_theta": 1e6},
}  # fmt: skip
TEXT = "ab\n\n12<|tool|>c<|im_end|>"
READ = """
import json, sys, torch, transformers
assert transformers.__version__ == "4.57.1"
found = {}
for folder in sys.argv[1:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    logits = model(torch.arange(200)[None] % 250).logits.sum(-1).flatten()
    found[folder] = logits.tolist(), tokenizer(TEXT).input_ids, tokenizer.eos_token
print(json.dumps(found))
"""


@pytest.mark.other_versions
def test_an_export_is_read_by_transformers_4(tmp_path):
    expected = {}
    for family, rope in ROPES.items():
        model, tokenizer = saved(tmp_path / family, family, ["<|tool|>"], rope_parameters=rope)
        logits = model(IDS).logits.sum(-1).flatten()
        expected[str(tmp_path / family)] = logits, tokenizer(TEXT).input_ids, tokenizer.eos_token
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "other"], check=True)
    python = tmp_path / "other" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", *OTHER], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    answer = subprocess.run(
        [python, "-c", f"TEXT = {TEXT!r}\n{READ}", *expected], env=environment, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    for folder, (logits, ids, eos) in json.loads(answer.stdout).items():
        assert (torch.tensor(logits) - expected[folder][0]).abs().max() < 1e-3
        assert (ids, eos) == expected[folder][1:]
