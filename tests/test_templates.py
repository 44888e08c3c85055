"""Prompts and stops of real chat templates: what a model was made with is what it is asked in."""

import json
from datetime import datetime, timedelta
from importlib import util
from pathlib import Path

import pytest
import torch
from conftest import TASK, make_model, make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from llms import Rendering, chat_prompt, load_model, settle_rendering, stop_token_ids
from rldatasets import Problem
from sampling import groups
from sampling.groups import sample_rollouts
from sampling.turns import worked_ids
from utils import UserError

TRL = util.find_spec("trl")
LLAMA = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
         "<|eot_id|>"]  # fmt: skip
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
DEEPSEEK = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"]
# Ours, in the shape of two that TRL does not ship: Mistral's of 2023, which takes no system message
# and puts blanks around turns, and SmolLM3's, which writes the day and how it thinks.
SHAPES = {
    "mistral": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
        "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "smollm3": (
        "{% set thinks = enable_thinking is not defined or enable_thinking %}"
        "<|im_start|>system\nToday: {{ strftime_now('%d %B %Y') }}\n"
        "Reasoning Mode: {{ '/think' if thinks else '/no_think' }}\n\n"
        "{{ messages[0]['content'] if messages[0]['role'] == 'system' else '' }}<|im_end|>\n"
        "{% for m in messages if m['role'] != 'system' %}<|im_start|>{{ m['role'] }}\n"
        "{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{{ '' if thinks else '<think>\n\n</think>\n' }}{% endif %}"
    ),
}
# {template: (special tokens, eos_token, bos_token, what ends its turns, the prompt)}
KNOWN = {
    "qwen2_5": (CHATML, "<|endoftext|>", None, "<|im_end|>",
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"),
    "qwen3": (CHATML, "<|endoftext|>", None, "<|im_end|>",
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n\n</think>\n\n"),
    "llama3": (LLAMA, "<|end_of_text|>", LLAMA[0], "<|eot_id|>",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    "llama3_2": (LLAMA, "<|end_of_text|>", LLAMA[0], "<|eot_id|>",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 02 Jan 2025\n\nS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    "gemma": (["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], "<eos>", "<bos>",
        "<end_of_turn>",
        "<bos><start_of_turn>user\nS\n\nQ<end_of_turn>\n<start_of_turn>model\n"),
    "phi3": (["<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
        "<|endoftext|>", "<s>", "<|end|>",
        "<|system|>\nS<|end|>\n<|user|>\nQ<|end|>\n<|assistant|>\n"),
    "deepseek_r1_distill": (DEEPSEEK, DEEPSEEK[1], DEEPSEEK[0], DEEPSEEK[1],
        "<｜begin▁of▁sentence｜>S<｜User｜>Q<｜Assistant｜><think>\n"),
    "mistral": (["<s>", "</s>", "[INST]", "[/INST]"], "</s>", "<s>", "</s>",
        "<s>[INST] S\n\nQ [/INST]"),
    "smollm3": (CHATML, "<|im_end|>", None, "<|im_end|>",
        "<|im_start|>system\nToday: 02 January 2025\nReasoning Mode: /no_think\n\nS<|im_end|>\n"
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n"),
}  # fmt: skip
DAY = Rendering("2025-01-02", {"enable_thinking": False})


def template(name):
    if name in SHAPES:
        return SHAPES[name]
    if TRL is None:
        pytest.skip("trl, which ships real chat templates, is not installed (requirements-dev.txt)")
    return (Path(TRL.origin).parent / "chat_templates" / f"{name}.jinja").read_text()


def byte_level(special, eos, bos=None, chat=None, bos_first=False):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(special)
    if bos_first:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=eos, bos_token=bos, chat_template=chat
    )


def of_family(name, rendering=DAY):
    special, eos, bos, *_ = KNOWN[name]
    tokenizer = byte_level(special, eos, bos, template(name))
    settle_rendering(tokenizer, rendering, "MODEL")
    return tokenizer


def always(tokenizer, token):
    """A model that says one token whatever it reads."""
    model = make_model(vocab_size=len(tokenizer), tie_word_embeddings=False)
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1.0)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()[token] = 1.0
    return model


@pytest.mark.parametrize("name", KNOWN)
def test_a_prompt_is_what_the_family_s_template_writes(name):
    tokenizer = of_family(name)
    assert tokenizer.decode(chat_prompt(tokenizer, "S", "Q")) == KNOWN[name][-1]


@pytest.mark.parametrize("name", KNOWN)
def test_a_completion_ends_where_the_template_ends_a_turn(name):
    tokenizer = of_family(name)
    end = tokenizer.convert_tokens_to_ids(KNOWN[name][3])
    model = always(tokenizer, end)
    assert set(stop_token_ids(model, tokenizer)) == {end, tokenizer.eos_token_id}
    rollouts = sample_rollouts(model, tokenizer, [chat_prompt(tokenizer, "S", "Q")], 1, 4, 0.0)
    assert rollouts.completion_mask.sum() == 1 and rollouts.finished.all()


def test_a_word_after_the_turn_is_no_stop():
    chat = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    tokenizer = byte_level(["<end>"], "<end>", chat=chat)
    assert stop_token_ids(make_model(), tokenizer) == [tokenizer.eos_token_id]


def test_a_turn_that_ends_only_before_the_next_one_is_a_stop_too():
    chat = ("{% for m in messages %}{{ m['content'] }}{% if not loop.last %}<sep>{% endif %}"
            "{% endfor %}")  # fmt: skip
    tokenizer = byte_level(["<end>", "<sep>"], "<end>", chat=chat)
    ends = tokenizer.convert_tokens_to_ids(["<end>", "<sep>"])
    assert stop_token_ids(make_model(), tokenizer) == sorted(ends)


def test_a_cold_start_teaches_the_end_of_the_turn():
    tokenizer = of_family("qwen2_5")
    [(ids, _)] = worked_ids(tokenizer, [Problem("1 + 1?", "2", "It is 2.")], TASK)
    assert tokenizer.decode(ids[-1:]) == "<|im_end|>"


def test_thinking_is_on_only_where_it_is_asked_for():
    thinking = Rendering("2025-01-02", {"enable_thinking": True})
    for name in ("qwen3", "smollm3"):
        prompts = [
            tokenizer.decode(chat_prompt(tokenizer, "S", "Q"))
            for tokenizer in (of_family(name), of_family(name, thinking))
        ]
        assert ["</think>" in prompt for prompt in prompts] == [True, False]


def test_arguments_reach_the_template():
    chat = "{{ reasoning_effort }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer = byte_level(["<end>"], "<end>", chat=chat)
    settle_rendering(tokenizer, Rendering(arguments={"reasoning_effort": "high"}), "MODEL")
    assert tokenizer.decode(chat_prompt(tokenizer, "S", "Q")) == "highSQ"


def test_an_argument_that_the_template_does_not_know_is_told(capsys):
    tokenizer = byte_level(["<end>"], "<end>", chat=SHAPES["smollm3"])
    settle_rendering(tokenizer, Rendering(arguments={"enable_thinking": True}), "MODEL")
    assert capsys.readouterr().out == ""
    tokenizer = byte_level(
        ["<end>"], "<end>", chat="{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    settle_rendering(tokenizer, Rendering(arguments={"enable_thinking": False}), "MODEL")
    assert capsys.readouterr().out == ""
    settle_rendering(tokenizer, Rendering(arguments={"enable_thinking": True, "efort": 1}), "MODEL")
    told = capsys.readouterr().out.splitlines()
    assert ["enable_thinking" in told[0], "efort" in told[1], len(told)] == [True, True, 2]


# --- the day ------------------------------------------------------------------------------------


class Tomorrow(datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.now(tz) + timedelta(days=1)


@pytest.mark.parametrize("name", ["llama3_2", "gptoss", "smollm3"])
def test_a_prompt_is_the_same_on_another_day(name, monkeypatch):
    special = KNOWN.get(name, (["<|start|>", "<|end|>", "<|return|>", "<|message|>"],))[0]
    tokenizer = byte_level(special, special[-1], special[0], template(name))
    settle_rendering(tokenizer, DAY, "MODEL")
    first = chat_prompt(tokenizer, "S", "Q")
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    assert chat_prompt(tokenizer, "S", "Q") == first
    assert "2025" in tokenizer.decode(first)
    del tokenizer.rendering  # nobody has said a day
    on_none = chat_prompt(tokenizer, "S", "Q")
    monkeypatch.undo()
    assert chat_prompt(tokenizer, "S", "Q") == on_none


def test_every_way_to_write_the_day_is_of_that_day():
    chat = "{{ strftime_now('%d/%m/%y %A %j %H:%M') }}{% for m in messages %}{{ m['content'] }}" \
           "{% endfor %}"  # fmt: skip
    tokenizer = byte_level(["<end>"], "<end>", chat=chat)
    settle_rendering(tokenizer, Rendering("2024-02-29"), "MODEL")
    assert tokenizer.decode(chat_prompt(tokenizer, "S", "Q")) == "29/02/24 Thursday 060 00:00SQ"


def test_the_clock_is_right_again_afterwards_also_after_an_error():
    tokenizer = byte_level(["<end>"], "<end>", chat="{{ raise_exception('no') }}")
    tokenizer.rendering = Rendering("2024-02-29")
    with pytest.raises(Exception, match="no"):
        chat_prompt(tokenizer, "S", "Q")
    assert chat_template_utils.datetime is datetime


# --- models without a chat template, or without system messages ----------------------------------


@pytest.mark.parametrize("bos_first", [True, False])
def test_without_a_chat_template_a_question_is_asked_in_plain_text(bos_first, tmp_path, capsys):
    tokenizer = byte_level(["<s>", "</s>"], "</s>", "<s>", bos_first=bos_first)
    make_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, loaded = load_model(str(tmp_path), "cpu")
    line = capsys.readouterr().out
    assert "plain text" in line and line.count("\n") == 1 and len(line) <= 200
    prompt = loaded.decode(chat_prompt(loaded, "Be brief.", "1 + 1?"))
    begin = "<s>" if bos_first else ""
    assert prompt == f"{begin}Be brief.\n\nQuestion: 1 + 1?\n\nAnswer:\n"
    assert stop_token_ids(model, loaded) == [loaded.eos_token_id]
    loaded.save_pretrained(tmp_path / "again")  # so that model/ is asked as it was trained
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path / "again")
    assert again.decode(chat_prompt(again, "Be brief.", "1 + 1?")) == prompt


def test_a_system_message_that_is_dropped_or_refused_begins_the_question(capsys):
    for chat in (
        "{% for m in messages if m['role'] == 'user' %}<u>{{ m['content'] }}{% endfor %}",
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "<u>{{ messages[0]['content'] }}",
        "{% if messages|length != 1 %}{{ none['x'].y }}{% endif %}<u>{{ messages[0].content }}",
    ):
        tokenizer = byte_level(["<end>", "<u>"], "<end>", chat=chat)
        settle_rendering(tokenizer, Rendering(), "--model_name m")
        assert tokenizer.decode(chat_prompt(tokenizer, "S", "Q")) == "<u>S\n\nQ"
        out = capsys.readouterr().out
        assert out.startswith("--model_name m: its chat takes no system message")


def test_a_template_that_fails_on_any_chat_is_refused_in_one_line():
    tokenizer = byte_level(["<end>"], "<end>", chat="{{ raise_exception('never') }}")
    with pytest.raises(UserError, match="takes no system message, nor a question alone"):
        settle_rendering(tokenizer, Rendering(), "--model_name m")


def test_how_prompts_are_rendered_is_not_written_into_a_saved_tokenizer(tmp_path):
    tokenizer = make_tokenizer()
    settle_rendering(tokenizer, DAY, "MODEL")
    tokenizer.save_pretrained(tmp_path)
    assert "2025-01-02" not in json.dumps([p.read_text() for p in tmp_path.iterdir()])


# --- strings that end a completion ---------------------------------------------------------------

SAYING = {  # {what the model says: (--stop, what is left of it)}
    "12 </answer> and on": (["</answer>"], "12 </answer>"),
    "a\n\nQuestion: b": (["\n\nQuestion:"], "a\n\nQuestion:"),
    "naïve café, more": (["ïve", "fé"], "naïve"),
    "aaab ab": (["ab", "b"], "aaab"),  # "ab" is one token here
    "STOP": (["STOP"], "STOP"),
    "never": (["nothing of it", "rev"], "never"),
    "x<|im_start|>y": (["<|im_start|>"], "x"),
}


def reciting(monkeypatch, rows):
    """Have sample_rollouts draw these ids, a list per row, each with a log-prob of -1."""
    drawn = []

    def numbers(seeds, questions, group_size, max_new_tokens, device):
        return torch.arange(len(rows)).double().repeat(max_new_tokens, 1)  # whose turn it is

    def say(logits, uniforms, *_):
        drawn.append([rows[int(row)][len(drawn)] for row in uniforms])
        return torch.tensor(drawn[-1]), torch.full((len(uniforms),), -1.0)

    monkeypatch.setattr(groups, "uniform_draws", numbers)
    monkeypatch.setattr(groups, "sample_tokens", say)


@pytest.mark.parametrize("look_every", [1, 3, 16])
def test_a_completion_ends_with_the_token_that_completes_a_stop(look_every, monkeypatch):
    if look_every > 1:  # as on a GPU
        monkeypatch.setattr(groups, "SHARING", ())
        monkeypatch.setattr(groups, "LOOK_EVERY", {"cpu": look_every})
    tokenizer, model = make_tokenizer(), make_model()
    for said, (stop, left) in SAYING.items():
        ids = [*tokenizer(said).input_ids, tokenizer.eos_token_id]
        other = tokenizer("z" * 25).input_ids
        reciting(monkeypatch, [ids + other, other])
        rollouts = sample_rollouts(model, tokenizer, [[1], [2]], 1, 25, 1.0, stop=stop)
        assert rollouts.texts == [[left], ["z" * 25]]
        said_by = [tokenizer.decode(ids[:n]) for n in range(len(ids))]
        ends = [n for n, text in enumerate(said_by) if any(string in text for string in stop)]
        end, mask = min(ends, default=len(ids)), rollouts.completion_mask[0, 0]
        assert mask[:end].all() and not mask[end:].any()
        assert rollouts.completion_ids[0, 0, :end].tolist() == ids[:end]
        assert (rollouts.completion_ids[0, 0, end:] == tokenizer.pad_token_id).all()
        assert (rollouts.logprobs[0, 0, end:] == 0).all() and (
            rollouts.logprobs[0, 0, :end] < 0
        ).all()
        assert rollouts.finished.tolist() == [[True], [False]]


def test_without_a_stop_nothing_is_decoded_on_the_way(monkeypatch):
    monkeypatch.setattr(groups, "string_ends", None)
    tokenizer, model = make_tokenizer(), make_model()
    sample_rollouts(model, tokenizer, [[1, 2]], 2, 5, 1.0, seeds=[3])


def test_a_stop_in_the_prompt_ends_nothing(monkeypatch):
    tokenizer, model = make_tokenizer(), make_model()
    reciting(monkeypatch, [tokenizer("acb").input_ids])
    prompt = tokenizer("STO").input_ids
    rollouts = sample_rollouts(model, tokenizer, [prompt], 1, 3, 1.0, stop=["STO", "Oa"])
    assert rollouts.completion_mask.sum() == 3
