"""Log-probabilities, the shared prefix, chat prompts, stop tokens and loading."""

import json
import shutil

import pytest
import torch
from conftest import make_args, make_model, make_tokenizer
from toys import PROMPT

from llms import chat_prompt, frozen_copy, kl_reference, load_model, mix_into, stop_token_ids
from utils import UserError


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_a_prompt_has_the_template_s_special_tokens_and_no_more(family):
    tokenizer = make_tokenizer(family)
    ids = chat_prompt(tokenizer, "Be brief.", "1 + 1?")
    text = tokenizer.decode(ids)
    if family == "llama":
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids[0] == tokenizer.bos_token_id
        assert text.endswith("1 + 1?<|eot|><|start|>assistant\n")
    else:
        assert text == (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1 + 1?<|im_end|>\n"
            "<|im_start|>assistant\n"
        )


def test_stop_tokens_come_from_tokenizer_and_generation_config_together():
    model, tokenizer = make_model(), make_tokenizer()
    end, text_end = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model.generation_config.eos_token_id = [text_end]
    assert stop_token_ids(model, tokenizer) == sorted([end, text_end])
    model.generation_config.eos_token_id = text_end
    assert stop_token_ids(model, tokenizer) == sorted([end, text_end])
    model.generation_config.eos_token_id = None
    assert stop_token_ids(model, tokenizer) == [end]


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_weights_are_fp32_whatever_the_file_holds(family, saved_models, tmp_path):
    model = make_model(family, torch.bfloat16, vocab_size=len(make_tokenizer(family)))
    model.save_pretrained(tmp_path)
    make_tokenizer(family).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    loaded, _ = load_model(str(tmp_path), "cpu")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert not loaded.training
    assert loaded.config._attn_implementation == "sdpa"


def test_damaged_weights_are_refused_in_one_line(tmp_path, saved_models):
    shutil.copytree(saved_models["qwen2"], tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(str(tmp_path / "model"), "cpu")


def test_a_chat_without_system_messages_is_refused(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    make_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="takes no system message"):
        load_model(str(tmp_path), "cpu")


def test_a_model_that_cannot_be_used_is_refused_in_one_line(tmp_path):
    tokenizer = make_tokenizer()
    make_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no-such-family"}')
    with pytest.raises(UserError, match="cannot be loaded") as raised:
        load_model(str(tmp_path), "cpu")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("tied", [True, False])
def test_saved_and_loaded_again_the_model_is_the_same_and_tied_as_before(tied, tmp_path):
    tokenizer = make_tokenizer()
    model = make_model(vocab_size=len(tokenizer), tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = load_model(str(tmp_path), "cpu")
    head = loaded.get_output_embeddings().weight
    assert (head is loaded.get_input_embeddings().weight) == tied
    assert torch.equal(loaded(PROMPT[None]).logits, model(PROMPT[None]).logits)


def test_the_reference_does_not_move_with_the_policy_and_mixes_by_alpha():
    policy = make_model()
    reference = frozen_copy(policy)
    start = [p.clone() for p in reference.parameters()]
    assert not any(p.requires_grad for p in reference.parameters())
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(p, q) for p, q in zip(reference.parameters(), start))
    mix_into(reference, policy, alpha=0.25)
    for mixed, old in zip(reference.parameters(), start):
        assert torch.allclose(mixed, old + 0.25, atol=1e-6)


def test_the_kl_compares_with_a_copy_unless_its_weight_is_zero():
    policy = make_model()
    assert kl_reference(policy, make_args(kl_beta=0.0)) is None
    reference = kl_reference(policy, make_args(kl_beta=0.1, update_ref_model=False))
    ours, theirs = (dict(model.named_parameters()) for model in (policy, reference))
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
    assert not {p.data_ptr() for p in ours.values()} & {p.data_ptr() for p in theirs.values()}
    assert all(p.requires_grad for p in ours.values())
