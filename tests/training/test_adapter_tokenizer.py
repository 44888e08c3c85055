"""An adapter brings the tokenizer and the chat template that it was trained with."""

import pytest
import torch
from conftest import CHATML, make_model, make_tokenizer
from peft import LoraConfig, get_peft_model

from llms import chat_prompt, load_model, stop_token_ids
from training.lora import embedding_rows
from utils import UserError

OWN = (
    "{% for m in messages %}### {{ m['role'] }}\n{{ m['content'] }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}### answer\n{% endif %}"
)
NEW = ["<|tool|>", "<|call|>", "<|done|>"]


def base(folder, chat=CHATML, vocab_size=None, tied=True):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = chat
    model = make_model(vocab_size=vocab_size or len(tokenizer), tie_word_embeddings=tied)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return model, tokenizer


def adapter(folder, model, save="auto", **config):
    """What peft writes of an adapter on the model, with weights that do something."""
    given = {"r": 2, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **config}
    tuned = get_peft_model(model, LoraConfig(**given))
    torch.manual_seed(1)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * 0.1
    tuned.peft_config["default"].base_model_name_or_path = str(folder / "base")
    tuned.save_pretrained(folder / "sft", save_embedding_layers=save)
    return tuned.merge_and_unload().eval()


@pytest.mark.parametrize("chat", [CHATML, None])
def test_an_adapter_is_asked_in_its_own_template_and_stops_at_its_own_token(chat, tmp_path):
    model, tokenizer = base(tmp_path, chat)
    adapter(tmp_path, model)
    own = make_tokenizer()
    own.chat_template, own.eos_token = OWN, "<|endoftext|>"
    own.save_pretrained(tmp_path / "sft")
    loaded, tokenizer = load_model(str(tmp_path / "sft"), "cpu")
    prompt = tokenizer.decode(chat_prompt(tokenizer, "s", "q"))
    assert prompt == "### system\ns<|endoftext|>\n### user\nq<|endoftext|>\n### answer\n"
    assert stop_token_ids(loaded, tokenizer) == [own.eos_token_id]


def test_a_template_alone_beside_the_adapter_is_used_with_the_base_s_tokenizer(tmp_path):
    model, _ = base(tmp_path)
    adapter(tmp_path, model)
    (tmp_path / "sft" / "chat_template.jinja").write_text(OWN)
    _, tokenizer = load_model(str(tmp_path / "sft"), "cpu")
    assert "### answer" in tokenizer.decode(chat_prompt(tokenizer, "s", "q"))


def test_without_one_of_its_own_the_base_s_is_used(tmp_path):
    model, plain = base(tmp_path)
    adapter(tmp_path, model)
    _, tokenizer = load_model(str(tmp_path / "sft"), "cpu")
    assert chat_prompt(tokenizer, "s", "q") == chat_prompt(plain, "s", "q")


def test_a_tokenizer_without_a_template_takes_the_base_s(tmp_path):
    model, plain = base(tmp_path)
    adapter(tmp_path, model)
    own = make_tokenizer()
    own.chat_template = None
    own.save_pretrained(tmp_path / "sft")
    _, tokenizer = load_model(str(tmp_path / "sft"), "cpu")
    assert chat_prompt(tokenizer, "s", "q") == chat_prompt(plain, "s", "q")


def test_the_last_of_several_adapters_decides(tmp_path):
    model, _ = base(tmp_path)
    adapter(tmp_path, model)
    inner = make_tokenizer()
    inner.chat_template = OWN
    inner.save_pretrained(tmp_path / "sft")
    (tmp_path / "sft").rename(tmp_path / "inner")
    model, _ = base(tmp_path)
    adapter(tmp_path, model)
    file = tmp_path / "sft" / "adapter_config.json"
    file.write_text(file.read_text().replace(str(tmp_path / "base"), str(tmp_path / "inner")))
    outer = make_tokenizer()
    outer.chat_template = OWN.replace("answer", "outer")
    for own, word in ((None, "### answer"), (outer, "### outer")):
        if own:
            own.save_pretrained(tmp_path / "sft")
        _, tokenizer = load_model(str(tmp_path / "sft"), "cpu")
        assert word in tokenizer.decode(chat_prompt(tokenizer, "s", "q"))


def with_new_tokens(folder, tied=True, vocab_size=None):
    model, tokenizer = base(folder, vocab_size=vocab_size, tied=tied)
    tokenizer.add_special_tokens({"additional_special_tokens": NEW})
    return model, tokenizer


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("config", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}])
def test_tokens_that_were_added_come_with_their_embeddings(tied, config, tmp_path):
    model, tokenizer = with_new_tokens(tmp_path, tied)
    model.resize_token_embeddings(len(tokenizer))
    model.get_input_embeddings().weight.data[-3:] = torch.randn(3, 32)
    expected = adapter(tmp_path, model, **config)
    tokenizer.save_pretrained(tmp_path / "sft")
    assert embedding_rows(tmp_path / "sft") == len(tokenizer)
    loaded, own = load_model(str(tmp_path / "sft"), "cpu")
    ids = torch.tensor([own(f"ab{''.join(NEW)}c").input_ids])
    assert ids.max() == len(tokenizer) - 1
    assert (loaded(ids).logits - expected(ids).logits).abs().max() < 1e-5
    assert loaded.config.vocab_size == len(tokenizer)


def test_tokens_that_were_added_without_embeddings_are_refused_with_what_helps(tmp_path):
    model, tokenizer = with_new_tokens(tmp_path)
    adapter(tmp_path, model, save=False)
    tokenizer.save_pretrained(tmp_path / "sft")
    with pytest.raises(UserError, match="save_embedding_layers") as raised:
        load_model(str(tmp_path / "sft"), "cpu")
    line = str(raised.value).replace(str(tmp_path), "")
    assert len(line) <= 180 and f"{len(tokenizer)} tokens" in line


def test_tokens_that_were_added_within_the_model_s_spare_rows_need_no_more(tmp_path):
    model, tokenizer = with_new_tokens(tmp_path, vocab_size=300)
    adapter(tmp_path, model)
    tokenizer.save_pretrained(tmp_path / "sft")
    loaded, own = load_model(str(tmp_path / "sft"), "cpu")
    assert loaded.get_input_embeddings().num_embeddings == 300
    assert own(NEW[0]).input_ids == [len(tokenizer) - 3]


def test_an_adapter_in_a_pickled_file_is_looked_into_as_well(tmp_path):
    tensors = {"base_model.model.model.embed_tokens.weight": torch.zeros(7, 4)}
    torch.save(tensors, tmp_path / "adapter_model.bin")
    assert embedding_rows(tmp_path) == 7
