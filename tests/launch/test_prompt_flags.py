"""The flags that make prompts and end answers, and how a run's own model is asked."""

import hashlib
import json
from datetime import date
from inspect import signature
from types import SimpleNamespace

import pytest
from conftest import TASK, make_tokenizer
from transformers import PreTrainedTokenizerBase

from launch.commands import parse_command
from launch.loading import check_same_data, prompts_sha256
from launch.parser import parse_args
from launch.values import NOT_THE_TEMPLATES
from llms import Rendering, rendering_of, settle_rendering
from rldatasets import Problem
from utils import UserError


def refusal(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        parse_args(["--preset", "cpu", *argv])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1 and len(line) <= 201
    return line


def parsed(tmp_path, *argv):
    return parse_args(["--preset", "cpu", "--output_dir", str(tmp_path / "run"), *argv])


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--chat_template_kwargs", "thinking", "no JSON object"),
        ("--chat_template_kwargs", "[1]", "no JSON object"),
        ("--chat_template_kwargs", "{'a': 1}", "no JSON object"),
        ("--chat_template_kwargs", "[" * 5000, "no JSON object"),
        ("--chat_template_kwargs", '{"enable_thinking": true}', "--enable_thinking"),
        ("--chat_template_kwargs", '{"tokenize": false}', "tokenize"),
        ("--prompt_date", "yesterday", "YYYY-MM-DD"),
        ("--prompt_date", "2026-02-30", "YYYY-MM-DD"),
        ("--prompt_date", "28.11.2026", "YYYY-MM-DD"),
        ("--stop", "", "empty"),
        ("--stop", "\udc80", "not text"),
    ],
)
def test_what_a_prompt_flag_may_not_be_is_told_in_one_line(flag, value, said, capsys):
    line = refusal(capsys, flag, value)
    assert flag in line and said in line


def test_strings_do_not_end_what_the_other_engine_samples(capsys):
    assert "--sampler paged" in refusal(capsys, "--stop", "x", "--sampler", "paged")


def test_nothing_that_transformers_takes_for_itself_is_an_argument_of_the_template():
    takes = signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    ours = {*takes} - {"tools", "documents", "kwargs"}
    assert ours <= NOT_THE_TEMPLATES


def test_the_flags_say_how_prompts_are_rendered(tmp_path):
    args = parsed(tmp_path, "--enable_thinking", "--prompt_date", "2025-01-02",
                  "--chat_template_kwargs", '{"reasoning_effort": "low"}')  # fmt: skip
    arguments = {"enable_thinking": True, "reasoning_effort": "low"}
    assert rendering_of(args) == Rendering("2025-01-02", arguments)
    args = parsed(tmp_path)
    assert rendering_of(args) == Rendering(date.today().isoformat(), {"enable_thinking": False})


def written_run(folder, **flags):
    """A run's directory, as far as the command line looks into it."""
    args = parse_args(["--preset", "cpu", "--output_dir", str(folder)])
    (folder / "model").mkdir(parents=True)
    config = {"model_type": "qwen2", "max_position_embeddings": 2048}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    (folder / "model" / "model.safetensors").touch()
    kept = {name: value for name, value in vars(args).items() if name not in flags}
    flags = {**kept, **{name: value for name, value in flags.items() if value is not ...}}
    (folder / "config.json").write_text(json.dumps({"flags": flags}))
    return folder


def test_a_resumed_run_keeps_its_day_and_takes_no_other(tmp_path, capsys):
    run = written_run(tmp_path / "run", prompt_date="2025-01-02")
    argv = ["--preset", "cpu", "--resume", "--output_dir", str(run)]
    assert parse_args(argv).prompt_date == "2025-01-02"
    with pytest.raises(SystemExit):
        parse_args([*argv, "--prompt_date", "2025-01-03"])
    assert "--prompt_date (was 2025-01-02)" in capsys.readouterr().err


def test_a_run_of_before_is_resumed_without_a_day(tmp_path):
    names = ("prompt_date", "enable_thinking", "chat_template_kwargs", "stop")
    run = written_run(tmp_path / "run", **dict.fromkeys(names, ...))
    args = parse_args(["--preset", "cpu", "--resume", "--output_dir", str(run)])
    assert (args.prompt_date, args.stop) == (date.today().isoformat(), [])


def test_a_run_of_before_takes_nothing_from_a_preset_that_has_changed_since(tmp_path):
    run = written_run(tmp_path / "run", skip_flat_groups=...)
    argv = ["--preset", "cpu", "--output_dir", str(run)]
    assert not parse_args([*argv, "--resume"]).skip_flat_groups
    assert parse_args([*argv[:-1], str(tmp_path / "new")]).skip_flat_groups


@pytest.mark.parametrize("name", ["evaluate", "chat", "group"])
def test_a_run_s_model_is_asked_as_in_the_run(name, tmp_path):
    asked = {
        "prompt_date": "2025-01-02", "enable_thinking": True, "stop": ["###"],
        "chat_template_kwargs": {"effort": 1},
    }  # fmt: skip
    run = written_run(tmp_path / "run", **asked)
    argv = [name, str(run / "model"), "--preset", "cpu", "--max_completion_length", "32"]
    argv += {"evaluate": ["--output_dir", str(tmp_path / "e")], "group": ["1 + 1?"]}.get(name, [])
    assert {key: vars(parse_command(argv))[key] for key in asked} == asked
    given = parse_command([*argv, "--no-enable_thinking", "--prompt_date", "2025-01-03"])
    assert (given.enable_thinking, given.prompt_date, given.stop) == (False, "2025-01-03", ["###"])


def test_another_model_is_asked_plainly_and_today(tmp_path):
    run = written_run(tmp_path / "run", stop=["###"])
    (run / "config.json").unlink()
    args = parse_command(["chat", str(run / "model"), "--preset", "cpu"])
    plain = (args.prompt_date, args.enable_thinking, args.chat_template_kwargs, args.stop)
    assert plain == (date.today().isoformat(), False, {}, [])


PROBLEMS = [Problem(f"What is {n} + {n}?", str(2 * n), "") for n in range(40)]
DATED = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m['content'] }}{% endfor %}"


def checksum(chat=DATED, day="2025-01-02", task=TASK, problems=PROBLEMS, **arguments):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = chat
    settle_rendering(tokenizer, Rendering(day, arguments), "MODEL")
    return prompts_sha256(tokenizer, problems, task)


def test_prompts_have_a_checksum_that_changes_with_whatever_makes_them():
    same = checksum()
    assert same == checksum() == checksum(problems=PROBLEMS[:16])
    another = SimpleNamespace(system_prompt="Answer.")
    others = [checksum(day="2025-01-03"), checksum(chat=f"{DATED}{{{{ x }}}}", x=1),
              checksum(chat=f"{DATED}."), checksum(task=another),
              checksum(problems=PROBLEMS[1:])]  # fmt: skip
    assert len({same, *others}) == 6
    tokenizer = make_tokenizer()
    ids = [tokenizer(f"02 Jan 2025{TASK.system_prompt}{p.question}").input_ids for p in PROBLEMS]
    assert same == hashlib.sha256(json.dumps(ids[:16]).encode()).hexdigest()


def test_a_run_goes_on_with_its_prompts_alone_and_one_of_before_with_any():
    facts = {"train_problems": 8, "problems_sha256": "a", "prompts_sha256": "b"}
    check_same_data(facts, None)
    check_same_data(facts, SimpleNamespace(path="p", data=facts))
    check_same_data(facts, SimpleNamespace(path="p", data={**facts} | {"left_out": 0}))
    before = {name: value for name, value in facts.items() if name != "prompts_sha256"}
    check_same_data(facts, SimpleNamespace(path="p", data=before))
    for data, said in (
        ({**facts, "prompts_sha256": "c"}, "other prompts"),
        ({**facts, "problems_sha256": "c"}, "other problems"),
        ({**before, "train_problems": 9}, "other problems"),
    ):
        with pytest.raises(UserError, match=said) as raised:
            check_same_data(facts, SimpleNamespace(path="runs/demo", data=data))
        assert len(str(raised.value)) <= 180
