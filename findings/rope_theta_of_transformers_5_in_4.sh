#!/bin/bash
# transformers 5.23.0 and 4.57.1, torch 2.13.0: what 5 saves has no rope_theta in its config.json, but
# rope_parameters with the base in it. 4.57.1 reads that file without a word, takes its own base of
# 10,000, and computes another function of the same weights. Here a Qwen2 of random weights with
# Qwen2.5's base of 1,000,000, largest difference of a logit at a sequence's 64th token. Seen:
#
#   5.23.0 base 1000000 difference 0.00
#   4.57.1 base 10000 difference 14.74
#   4.57.1 base 1000000 difference 0.00   (rope_theta written beside rope_parameters)
#
# Exits 0 while that is so, 1 when it has changed. Needs a package index; takes a few minutes.
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
pip="$folder/env/bin/pip install -q"
$pip torch==2.13.0 numpy==2.4.6
$pip --target "$folder/five" transformers==5.23.0
$pip --target "$folder/four" transformers==4.57.1
cd "$folder"
export HF_HUB_OFFLINE=1
cat > write.py <<'EOF'
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

torch.manual_seed(0)
config = Qwen2Config(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, initializer_range=0.5,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
)
model = Qwen2ForCausalLM(config).eval()
model.save_pretrained("model")
torch.save(model(torch.arange(64)[None]).logits[0, -1].detach(), "logits.pt")
EOF
cat > read.py <<'EOF'
import sys

import torch
import transformers

model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
logits = model(torch.arange(64)[None]).logits[0, -1].detach()
base = 1 / float(model.model.rotary_emb.inv_freq[1]) ** 8  # of 8 frequencies per head
apart = float((logits - torch.load("logits.pt", weights_only=True)).abs().max())
print(f"{transformers.__version__} base {base:.0f} difference {apart:.2f}")
EOF
cat > name.py <<'EOF'
import json
import shutil

shutil.copytree("model", "named")
with open("model/config.json") as file:
    config = json.load(file)
assert "rope_theta" not in config
with open("named/config.json", "w") as file:
    json.dump(config | {"rope_theta": config["rope_parameters"]["rope_theta"]}, file)
EOF
run() { PYTHONPATH="$folder/$1" "$folder/env/bin/python" "${@:2}"; }
run five write.py 2>said
run five name.py
run five read.py model 2>>said
run four read.py model 2>warned | tee four.txt
run four read.py named 2>>said | tee named.txt
grep -i rope warned && exit 1
grep -q " base 10000 " four.txt && ! grep -q "difference 0.0" four.txt &&
  grep -q " base 1000000 difference 0.00" named.txt
