#!/bin/bash
# transformers 5.23.0, tokenizers 0.23.3: where tokenizer_config.json names GPT2Tokenizer, what loads
# has the vocabulary of tokenizer.json and not its pre-tokenizer, without a warning; saving it writes
# the loss down. Here the file splits every digit off first, as SmolLM2's does. Seen:
#
#   by the file:      ['ĊĊ', '1', '2']
#   as it loads:      ['Ċ', 'Ċ', '12']
#   saved and loaded: ['Ċ', 'Ċ', '12']
#
# Exits 0 while that is so, 1 when it has changed. Needs a package index; takes a minute.
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/env/bin/python" - <<'EOF'
import json
import sys

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
merges = [("1", "2"), ("Ċ", "Ċ")]
words = [*alphabet, *map("".join, merges), "<|endoftext|>"]
core = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
core.pre_tokenizer = pre_tokenizers.Sequence([
    pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
])
core.decoder = decoders.ByteLevel()
core.add_special_tokens(["<|endoftext|>"])
core.save("tokenizer.json")
with open("tokenizer_config.json", "w") as file:
    json.dump({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}, file)

loaded = AutoTokenizer.from_pretrained(".")
loaded.save_pretrained("again")
text = "\n\n12"
seen = {
    "by the file:": core.encode(text).tokens,
    "as it loads:": loaded.tokenize(text),
    "saved and loaded:": AutoTokenizer.from_pretrained("again").tokenize(text),
}
for name, tokens in seen.items():
    print(f"{name:17} {tokens}")
lost = ["Ċ", "Ċ", "12"]
sys.exit(list(seen.values()) != [["ĊĊ", "1", "2"], lost, lost])
EOF
