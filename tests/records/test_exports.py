"""A model directory says what it is in the words of transformers 4 as well as in those of 5."""

import json

import pytest
import torch
from conftest import make_model, make_tokenizer
from transformers import AutoModelForCausalLM

from llms import load_model, load_tokenizer
from records.exports import write_for_others

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
ROPES = {  # (family, rope_parameters): rope_scaling beside rope_theta, as version 4 has them
    ("qwen2", 1e6): ({"rope_type": "default"}, None),
    ("qwen3", 5e6): ({"rope_type": "default"}, None),
    ("llama", 1e4): ({"rope_type": "linear", "factor": 2.0},) * 2,
    ("llama", 5e5): (LLAMA3, LLAMA3),
    ("qwen2", 1e5): ({"rope_type": "dynamic", "factor": 4.0},) * 2,
}
IDS = torch.arange(200)[None] % 250


def saved(folder, family="qwen2", special=(), **config):
    tokenizer, model = make_tokenizer(), make_model(family, **config)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_for_others(folder)
    return model, tokenizer


@pytest.mark.parametrize(("family", "theta"), ROPES)
def test_the_rotary_embedding_is_written_under_both_names_and_read_the_same(
    family, theta, tmp_path
):
    rope, scaling = ROPES[family, theta]
    model, _ = saved(tmp_path, family, rope_parameters={**rope, "rope_theta": theta})
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["rope_theta"], config["rope_scaling"]) == (theta, scaling)
    assert config["rope_parameters"] == {**rope, "rope_theta": theta}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    loaded.save_pretrained(tmp_path / "again")
    write_for_others(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert [again[name] for name in ("rope_theta", "rope_scaling")] == [theta, scaling]


def test_the_tokenizer_is_of_a_class_and_has_tokens_that_version_4_knows(tmp_path):
    _, tokenizer = saved(tmp_path, special=["<|tool|>", "<|x|>"])
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<|tool|>", "<|x|>"]
    assert "extra_special_tokens" not in config
    loaded = load_tokenizer(tmp_path)
    text = "ab\n\n1 <|tool|>2<|im_end|>"
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.decode(loaded(text).input_ids, skip_special_tokens=True) == "ab\n\n1 2"


def test_what_has_no_such_facts_is_left_as_it_is(tmp_path):
    for name, facts in (
        ("config.json", {"model_type": "gpt2"}), ("tokenizer_config.json", {"eos_token": "\u00e9"})
    ):  # fmt: skip
        (tmp_path / name).write_text(json.dumps(facts))
        write_for_others(tmp_path)
        assert json.loads((tmp_path / name).read_text()) == facts
    (tmp_path / "config.json").unlink()
    write_for_others(tmp_path)  # an adapter's directory has none
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer_config.json"]


def test_a_model_that_was_written_so_is_one_to_train(tmp_path):
    model, _ = saved(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    loaded, _ = load_model(str(tmp_path), "cpu")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
