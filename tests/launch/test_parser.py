"""The command line: presets, aliases, and one line with exit status 2 for every mistake."""

import json
import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from launch import checks
from launch.hub import hub_file
from launch.parser import parse_args
from launch.presets import PRESETS, PRESETS_ON
from utils import UserError

CPU = ["--preset", "cpu"]


@pytest.fixture(autouse=True)
def empty_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def hub(monkeypatch):
    """A hub that has whatever is asked for; the value returned is the config.json it serves."""
    config = {"model_type": "qwen2", "max_position_embeddings": 32768}

    def serve(repo_id, filename, repo_type, flag, needed=True):
        with open("served.json", "w") as file:
            json.dump(config, file)
        return "served.json"

    monkeypatch.setattr(checks, "hub_file", serve)
    return config


def refused(capsys, *argv):
    """The one line that a mistake is answered with."""
    with pytest.raises(SystemExit) as stop:
        parse_args(list(argv))
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert message.startswith("main.py: error: ")
    assert len(message) <= 201
    return message


def test_the_default_is_the_h100_experiment(hub):
    args = parse_args([])
    assert args.model_name == "Qwen/Qwen2.5-1.5B-Instruct"
    assert args.dataset_name == "gsm8k"
    original = {
        "temperature": 0.9, "group_size": 16, "max_prompt_length": 256,
        "max_completion_length": 786, "num_train_iters": 1000, "kl_beta": 0.04, "seed": 7111994,
        "learning_rate": 5e-6, "questions_per_step": 4, "adam_beta1": 0.9, "adam_beta2": 0.99,
        "warmup_percent": 0.18, "weight_decay": 0.1, "max_grad_norm": 0.1, "save_steps": 100,
        "update_ref_model": False, "update_ref_model_freq": 200, "ref_model_mixup_alpha": 0.1,
        "verbose": False, "evaluator": None,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in original} == original


def test_the_original_s_flags_work_under_their_old_names(hub):
    args = parse_args(
        "--num_chains 8 --kl_weight_beta 0.1 --num_train_iters 7 --eval_iterations 3 "
        "--gradient_accumulation_steps 2 --update_ref_model --verbose --save_steps 5 "
        "--output_dir out --evaluator gsm8k --seed 3".split()
    )
    assert (args.group_size, args.kl_beta, args.num_train_iters) == (8, 0.1, 7)
    assert (args.questions_per_step, args.eval_iterations, args.save_steps) == (2, 3, 5)
    assert args.update_ref_model and args.verbose and args.output_dir == "out"


def test_the_preset_replaces_defaults_and_explicit_flags_win_in_any_order():
    for argv in (["--kl_beta", "0.5", *CPU], [*CPU, "--kl_beta", "0.5"]):
        args = parse_args(argv)
        assert args.kl_beta == 0.5
        expected = {**PRESETS["cpu"], **PRESETS_ON["cpu", "arithmetic"], "kl_beta": 0.5}
        assert {name: getattr(args, name) for name in expected} == expected


def test_on_gsm8k_the_cpu_preset_leaves_room_for_longer_solutions(gsm8k):
    argv = [*CPU, "--dataset_name", "gsm8k", "--dataset_path", str(gsm8k)]
    assert parse_args(argv).max_completion_length == 160
    assert parse_args([*argv, "--max_completion_length", "99"]).max_completion_length == 99


def test_both_presets_set_the_same_flags():
    assert PRESETS["cpu"].keys() == PRESETS["h100"].keys()


def test_the_upper_clip_bound_follows_the_lower_unless_given():
    assert parse_args([*CPU, "--clip_epsilon", "0.1"]).clip_epsilon_high == 0.1
    assert parse_args([*CPU, "--clip_epsilon_high", "0.28"]).clip_epsilon == 0.2


@pytest.mark.parametrize(
    "argv",
    [
        ["--group_size", "1"], ["--num_chains", "0"], ["--group_size", "2.5"], ["--seed", "-1"],
        ["--learning_rate", "nan"], ["--learning_rate", "inf"], ["--learning_rate", "0"],
        ["--learning_rate", "-1e-6"], ["--learning_rate", "fast"], ["--temperature", "0"],
        ["--temperature", "nan"], ["--kl_beta", "-0.1"], ["--kl_beta", "nan"], ["--top_p", "0"],
        ["--top_p", "1.1"], ["--top_k", "-1"], ["--min_p", "2"], ["--clip_epsilon", "1.5"],
        ["--questions_per_step", "0"], ["--max_completion_length", "0"], ["--adam_beta1", "1"],
        ["--warmup_percent", "1.5"], ["--max_grad_norm", "nan"], ["--num_inner_epochs", "0"],
        ["--eval_batch_size", "0"], ["--save_steps", "-5"], ["--difficulty", "6"],
        ["--aggregation", "mean"], ["--lr_schedule", "linear"], ["--dataset_name", "maths"],
        ["--preset", "tpu"], ["--evaluator", "mine"], ["--reward_weights", "correctness"],
        ["--reward_weights", "correctness=nan"], ["--weight_decay", "-1"], ["--kl_estimator", "k4"],
        ["--advantage_scale", "max"], ["--cold_start_steps", "-1"], ["--micro_batch_tokens", "-1"],
        ["--max_draws", "0"], ["--train_group_size", "-1"],
        ["--ref_model_mixup_alpha", "2"], ["--update_ref_model_freq", "0"], ["--learning_rate"],
        ["--sampler", "vllm"],
    ],
)  # fmt: skip
def test_a_bad_value_is_named_with_its_flag(capsys, argv):
    message = refused(capsys, *CPU, *argv)
    assert argv[0] in message
    assert len(argv) == 1 or argv[1].split("=")[-1] in message


def test_abbreviations_and_typos_are_refused_with_a_suggestion(capsys):
    assert "unknown argument --num_ch" in refused(capsys, *CPU, "--num_ch", "4")
    message = refused(capsys, *CPU, "--learnin_rate", "1e-5")
    assert "did you mean --learning_rate?" in message


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--dataset_path", "nowhere"], ["--dataset_path nowhere", "train.jsonl"]),
        (["--dataset_path", "."], ["--dataset_path .", "train.jsonl"]),
        (["--update_ref_model", "--kl_beta", "0"], ["--update_ref_model", "--kl_beta"]),
        (["--mask_truncated", "--train_group_size", "4"], ["--mask_truncated", "--train_group"]),
        (["--mask_truncated", "--max_draws", "2"], ["--mask_truncated", "--max_draws"]),
        (["--sampling_batch_size", "7"], ["--sampling_batch_size 7", "--group_size 8"]),
        (["--train_group_size", "1"], ["--train_group_size 1", "--group_size 8"]),
        (["--train_group_size", "9"], ["--train_group_size 9", "--group_size 8"]),
        (["--sampler", "paged", "--top_k", "5"], ["--sampler paged", "--top_k"]),
        (["--sampler", "paged", "--top_p", "0.9"], ["--sampler paged", "--top_p"]),
        (["--sampler", "paged", "--min_p", "0.1"], ["--sampler paged", "--min_p"]),
    ],
)
def test_flags_that_do_not_fit_the_machine_or_each_other(capsys, argv, parts):
    message = refused(capsys, *CPU, "--dataset_name", "gsm8k", *argv)
    assert all(part in message for part in parts)


def test_the_other_engines_are_off_unless_asked_for(capsys, monkeypatch):
    assert parse_args(CPU).sampler == "shared_prefix"
    assert parse_args([*CPU, "--sampler", "paged"]).sampler == "paged"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name != "triton")
    assert "triton" in refused(capsys, *CPU, "--sampler", "fused")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert parse_args([*CPU, "--sampler", "fused", "--top_k", "5"]).sampler == "fused"


def test_generated_data_takes_no_path(capsys):
    message = refused(capsys, *CPU, "--dataset_name", "arithmetic", "--dataset_path", "x.jsonl")
    assert "--dataset_path" in message


def test_a_path_alone_means_files_under_every_preset(tmp_path):
    (tmp_path / "mine.jsonl").write_text("")
    args = parse_args([*CPU, "--dataset_path", "mine.jsonl"])
    assert (args.dataset_name, args.max_completion_length) == ("gsm8k", 160)


@pytest.mark.parametrize(
    ("name", "files", "reason"),
    [
        ("./nowhere", None, "no such directory"),
        ("no/such/thing", None, "no such directory"),
        ("mymodel", None, "no such directory"),
        ("there", {}, "no config.json"),
        ("there", {"config.json": "{}"}, "no weights"),
        ("there", {"config.json": "{", "a.safetensors": ""}, "damaged"),
        ("there", {"config.json": "[]", "a.safetensors": ""}, "damaged"),
        ("there", {"config.json": '{"architectures": ["BertForMaskedLM"], "model_type": "bert", '
                   '"max_position_embeddings": 512}', "a.safetensors": ""},
         "is a BertForMaskedLM, no causal language model"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_work_is_refused(capsys, tmp_path, name, files, reason):
    if files is not None:
        (tmp_path / "there").mkdir()
        for file, text in files.items():
            (tmp_path / "there" / file).write_text(text)
    message = refused(capsys, *CPU, "--model_name", name)
    assert f"--model_name {name}" in message
    assert reason in message


@pytest.mark.parametrize(
    "config",
    [
        {"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 200},
        {"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 200}},
    ],
)
def test_a_longrope_model_s_context_ends_where_a_row_depends_on_others(capsys, hub, config):
    hub.update(config)
    message = refused(capsys, *CPU, "--model_name", "some/model")
    assert "above the model's context of 200 tokens" in message


def test_prompt_and_completion_must_fit_the_model_s_context(capsys, hub):
    hub["max_position_embeddings"] = 1000
    message = refused(capsys)  # 256 + 786 tokens
    assert "--max_completion_length 786" in message and "1000" in message
    message = refused(capsys, *CPU, "--max_completion_length", "8000")
    assert "8192" in message


def test_a_directory_that_holds_anything_is_not_written_to(capsys, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text("{}")
    assert "--output_dir old" in refused(capsys, *CPU, "--output_dir", "old")
    (tmp_path / "file").write_text("")
    assert "--output_dir file/run" in refused(capsys, *CPU, "--output_dir", "file/run")


def test_nothing_is_written_by_a_refused_command(capsys, tmp_path):
    refused(capsys, *CPU, "--output_dir", "new/run", "--group_size", "1")
    parse_args([*CPU, "--output_dir", "new/run"])
    assert list(tmp_path.iterdir()) == []


def test_help_shows_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in PRESETS["h100"]:
        assert f"--{name}" in text
    assert "(default: 786)" in text


def unreachable_hub(environment=()):
    """`python main.py` as a user starts it, with no way to the hub and an empty cache."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(ROOT / "main.py")],
        capture_output=True, text=True, timeout=60,
        env={**os.environ, "HF_HOME": "cache", "HF_ENDPOINT": "http://127.0.0.1:9",
             "HF_TOKEN": "hf_canary1234567890", **dict(environment)},
    )  # fmt: skip
    return done, time.monotonic() - started


def test_without_the_hub_main_says_so_in_one_line_within_five_seconds(tmp_path):
    done, seconds = unreachable_hub()
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "make demo" in done.stderr and "--model_name PATH" in done.stderr
    assert seconds < 5
    assert "canary" not in done.stdout + done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_hub_that_never_answers_is_given_up_on(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr("launch.hub.HUB_SECONDS", 0.2)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *a, **k: time.sleep(3))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: None)
    started = time.monotonic()
    with pytest.raises(UserError, match="cannot reach"):
        hub_file("owner/name", "config.json", "model", "--model_name owner/name")
    assert time.monotonic() - started < 1.5


def test_what_the_cache_holds_serves_when_the_hub_does_not(monkeypatch):
    import huggingface_hub
    from huggingface_hub import constants

    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", offline)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: "cached.json")
    assert hub_file("owner/name", "config.json", "model", "--model_name") == "cached.json"
    assert constants.HF_HUB_OFFLINE
