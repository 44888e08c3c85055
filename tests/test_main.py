"""What a step draws, and whole runs end to end."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, make_args, make_model, make_setup, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluator
import main
from launch.parser import parse_args
from records.files import Series
from records.rollout_file import load_rollouts
from rldatasets import Problem, Problems, arithmetic_problems
from training.lean_layers import checkpointed
from utils import UserError


def test_every_draw_of_every_question_has_a_seed_of_its_own(accelerator, monkeypatch):
    seen = []
    real = main.sample_groups
    monkeypatch.setattr(
        main, "sample_groups", lambda *inputs: seen.extend(inputs[2]) or real(*inputs)
    )
    tokenizer = make_tokenizer()
    args = make_args(
        seed=3, group_size=2, questions_per_step=3, max_draws=2, max_completion_length=2
    )
    problems = Problems([Problem(f"{n}?", str(n), "") for n in range(5)], 0)
    run = SimpleNamespace(save_step=lambda *_: None)
    for step in range(2):
        model = make_model(vocab_size=len(tokenizer))
        main.draw_groups(make_setup(model, args, accelerator, tokenizer), problems, step, run)
    assert len(seen) == len(set(seen)) == 12


# --- whole runs --------------------------------------------------------------------------------

TINY = [
    "--preset", "cpu", "--questions_per_step", "2", "--group_size", "3", "--num_train_iters", "2",
    "--eval_problems", "5", "--max_completion_length", "12", "--max_prompt_length", "400",
    "--cold_start_steps", "1", "--precision", "fp32",
]  # fmt: skip


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.figures
@pytest.mark.parametrize("family", ["qwen2", pytest.param("llama", marks=pytest.mark.slow)])
def test_a_saved_model_trains_and_the_run_leaves_everything_behind(family, saved_models, tmp_path):
    run = tmp_path / "run"
    main.train(
        parse_args(
            [*TINY, "--model_name", str(saved_models[family]), "--output_dir", str(run), "--seed",
             "5", "--kl_beta", "0.04", "--update_ref_model", "--update_ref_model_freq", "1",
             "--eval_iterations", "1", "--save_steps", "2", "--num_inner_epochs", "2",
             "--warmup_percent", "0", "--learning_rate", "0.001", "--eval_samples", "2",
             "--save_rollouts", "--overlong_buffer", "6", "--weights_dtype", "bfloat16"]
        )
    )  # fmt: skip
    config = json.loads((run / "config.json").read_text())
    assert config["flags"]["seed"] == 5 and config["flags"]["kl_beta"] == 0.04
    assert config["packages"]["torch"] and config["device"] == "cpu"
    metrics = lines(run / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [0, 1]
    for key in ("reward", "rewards/correctness", "loss", "kl", "entropy", "grad_norm", "mismatch",
                "clip_fraction", "completion_length", "learning_rate", "tokens_per_second",
                "rewards/overlong", "weights_changed", "weights_changed_bf16", "tokens/sampled",
                "tokens/trained", "seconds/sampling", "seconds/reference",
                "seconds/policy"):  # fmt: skip
        assert math.isfinite(metrics[1][key]), key
    assert metrics[1]["alarms"] == []
    rates = [row["learning_rate"] for row in metrics]
    assert rates == pytest.approx([1e-3, 5e-4])  # cosine over two steps, whatever the epochs
    evaluations = lines(run / "eval.jsonl")
    assert [row["step"] for row in evaluations] == [0, 1, 2]
    assert all(row["problems"] == 5 and 0 <= row["pass@2"] <= 1 for row in evaluations)
    assert [row.get("mcnemar_p", "none yet") for row in evaluations] == ["none yet", 1.0, 1.0]
    held_out = [problem.question for problem in arithmetic_problems("test", 5)[:5]]
    for step in (0, 1, 2):
        answers = lines(run / "completions" / f"eval_{step:05d}.jsonl")
        assert [row["question"] for row in answers] == held_out
    rows = lines(run / "completions" / "step_00001.jsonl")
    assert len(rows) == 6
    assert {"question", "answer", "completion", "rewards", "reward", "advantage"} <= rows[0].keys()
    rollouts, rewards, advantages, chosen = load_rollouts(run / "rollouts/step_00001.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    completions = rollouts.completion_ids.flatten(0, 1), rollouts.completion_mask.flatten(0, 1)
    texts = [
        tokenizer.decode(ids[mask], skip_special_tokens=True) for ids, mask in zip(*completions)
    ]
    assert texts == [row["completion"] for row in rows]
    assert "assistant" in tokenizer.decode(rollouts.prompt_ids[1]) and len(rollouts.prompt_ids) == 2
    assert (rollouts.logprobs[rollouts.completion_mask] < 0).all() and chosen.all()
    assert rewards.total.flatten().tolist() == [row["reward"] for row in rows]
    assert rewards.per_function.flatten(0, 1).tolist() == [[*r["rewards"].values()] for r in rows]
    assert advantages.flatten().tolist() == [row["advantage"] for row in rows]
    tokens = lines(run / "completions" / "tokens_00001.jsonl")
    text = rows[tokens[0]["row"]]["completion"]
    assert len(tokens) == 3 and "".join(tokens[0]["tokens"]).startswith(text)
    assert "Held-out accuracy" in (run / "report.html").read_text()
    plots = {path.name for path in (run / "plots").iterdir()}
    assert {
        "overview.png",
        "budget.png",
        "reward.png",
        "rewards_correctness.png",
        "eval_accuracy.png",
    } <= plots
    for folder in ("model", "checkpoints/step_00002"):
        model = AutoModelForCausalLM.from_pretrained(run / folder)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    final = AutoModelForCausalLM.from_pretrained(run / "model")
    start = AutoModelForCausalLM.from_pretrained(saved_models[family])
    assert not torch.equal(final.model.embed_tokens.weight, start.model.embed_tokens.weight)
    assert AutoTokenizer.from_pretrained(run / "model").chat_template


@pytest.mark.figures
def test_a_sixth_reward_needs_its_function_and_one_list_entry(
    saved_models, tmp_path, monkeypatch, capsys
):
    def brevity(completion, problem):
        return 1.0 if len(completion) < 10 else 0.25

    monkeypatch.setattr(evaluator, "REWARD_FUNCTIONS", [*evaluator.REWARD_FUNCTIONS, brevity])
    run = tmp_path / "run"
    main.train(
        parse_args([*TINY, "--model_name", str(saved_models["qwen2"]), "--output_dir", str(run),
                    "--reward_weights", "brevity=2"])
    )  # fmt: skip
    assert "warning: rewards: brevity earns 2 with the bare number" in capsys.readouterr().err
    first = lines(run / "metrics.jsonl")[0]
    assert first["rewards/brevity"] >= 0.25
    row = lines(run / "completions" / "step_00000.jsonl")[0]
    assert row["reward"] == pytest.approx(sum(row["rewards"].values()) + row["rewards"]["brevity"])
    assert "rewards/brevity" in lines(run / "eval.jsonl")[0]
    assert (run / "plots" / "rewards_brevity.png").exists()
    assert (run / "plots" / "eval_rewards_brevity.png").exists()


def test_the_checkpointing_flag_reaches_the_layers(saved_models, tmp_path, monkeypatch):
    def stop(setup, *_):
        assert all(layer.training for layer in checkpointed(setup.policy))
        raise InterruptedError

    monkeypatch.setattr(main, "cold_start", stop)
    argv = [*TINY, "--model_name", str(saved_models["llama"]), "--gradient_checkpointing",
            "--output_dir", str(tmp_path / "run")]  # fmt: skip
    with pytest.raises(InterruptedError):
        main.train(parse_args(argv))


def test_two_runs_of_one_seed_are_the_same_run(saved_models, tmp_path):
    weights = []
    for name in ("one", "two"):
        run = tmp_path / name
        main.train(
            parse_args(
                [*TINY, "--model_name", str(saved_models["qwen2"]), "--output_dir", str(run)]
            )
        )
        weights.append((run / "model" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--reward_weights", "corectness=2"], "--reward_weights corectness: no such reward"),
        (["--max_prompt_length", "20"], "--max_prompt_length 20: no training prompt"),
    ],
)
def test_what_only_the_files_can_tell_is_refused_before_anything_is_written(
    flags, reason, saved_models, tmp_path
):
    run = tmp_path / "run"
    argv = [*TINY, "--model_name", str(saved_models["qwen2"]), "--output_dir", str(run), *flags]
    with pytest.raises(UserError, match=reason):
        main.train(parse_args(argv))
    assert not run.exists()


def test_a_test_question_that_leaves_no_room_for_an_answer_is_refused(saved_models, tmp_path):
    for split, question in (("train", "1 + 1?"), ("test", "1 + 1? " * 160)):
        row = {"question": question, "answer": "So it is 2. #### 2"}
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row))
    argv = [*TINY, "--dataset_name", "gsm8k", "--dataset_path", str(tmp_path), "--output_dir",
            str(tmp_path / "run"), "--model_name", str(saved_models["qwen2"])]  # fmt: skip
    with pytest.raises(
        UserError, match=r"--max_completion_length 12: .* exceeds the model's context"
    ):
        main.train(parse_args(argv))
    assert not (tmp_path / "run").exists()


def test_over_long_training_questions_are_left_out_whole_and_counted(
    saved_models, tmp_path, capsys
):
    rows = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(6)]
    rows.append({"question": "long " * 100, "answer": "#### 1"})
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "9 + 1?", "answer": "10"}))
    run = tmp_path / "run"
    argv = [*TINY, "--dataset_name", "gsm8k", "--dataset_path", str(tmp_path), "--output_dir",
            str(run), "--model_name", str(saved_models["qwen2"]), "--cold_start_steps", "0",
            "--num_train_iters", "4"]  # fmt: skip
    main.train(parse_args(argv))
    assert "1 of 7 training questions left out" in capsys.readouterr().out
    assert json.loads((run / "config.json").read_text())["left_out"] == 1
    asked = {
        row["question"]
        for step in range(4)  # 8 draws from 6 questions: the data is gone through again
        for row in lines(run / "completions" / f"step_{step:05d}.jsonl")
    }
    assert asked == {f"{i} + 1?" for i in range(6)}


def flat_for_even_answers():
    """A reward that tells completions apart for odd numbers alone."""
    calls = iter(range(10**6))

    def alternating(completion, problem):
        return float(next(calls) % 2) if int(problem.answer) % 2 else 1.0

    return alternating


def test_questions_are_drawn_until_enough_groups_carry_signal(saved_models, tmp_path, monkeypatch):
    """Half of the groups are flat."""
    rows = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(70)]
    for split, part in (("train", rows[:60]), ("test", rows[60:])):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, part)))
    monkeypatch.setattr(evaluator, "REWARD_FUNCTIONS", [flat_for_even_answers()])
    run = tmp_path / "run"
    argv = [*TINY, "--dataset_name", "gsm8k", "--dataset_path", str(tmp_path), "--output_dir",
            str(run), "--model_name", str(saved_models["qwen2"]), "--cold_start_steps", "0",
            "--num_train_iters", "4", "--group_size", "4", "--max_draws", "6",
            "--train_group_size", "2"]  # fmt: skip
    main.train(parse_args(argv))
    metrics = lines(run / "metrics.jsonl")
    drawn, asked = [], []
    for step, row in enumerate(metrics):
        saved = lines(run / "completions" / f"step_{step:05d}.jsonl")
        drawn.append(len(saved) // 8)  # draws of two groups of four
        asked += [record["question"] for record in saved[::4]]
        groups = [saved[i : i + 4] for i in range(0, len(saved), 4)]
        trained = [group for group in groups if any(record["advantage"] for record in group)]
        signal = [group for group in groups if len({record["reward"] for record in group}) > 1]
        assert trained == signal[:2]
        assert all(sum(bool(r["advantage"]) for r in group) == 2 for group in trained)
        assert drawn[-1] == 6 or len(signal) >= 2
        assert row["flat_groups"] == pytest.approx(1 - len(signal) / len(groups))
        assert row["grad_norm"] > 0
    assert max(drawn) > 1
    assert len(asked) == len(set(asked))  # no step draws what another has drawn


def test_a_run_that_skips_flat_groups_trains_on_the_others_alone(
    saved_models, tmp_path, monkeypatch
):
    monkeypatch.setattr(evaluator, "REWARD_FUNCTIONS", [flat_for_even_answers()])
    run = tmp_path / "run"
    argv = [*TINY, "--output_dir", str(run), "--model_name", str(saved_models["qwen2"]),
            "--cold_start_steps", "0", "--num_train_iters", "4", "--questions_per_step", "4",
            "--kl_beta", "0.1", "--skip_flat_groups"]  # fmt: skip
    main.train(parse_args(argv))
    rows = lines(run / "metrics.jsonl")
    for step, row in enumerate(rows):
        saved = lines(run / "completions" / f"step_{step:05d}.jsonl")
        groups = [saved[i : i + 3] for i in range(0, len(saved), 3)]
        signal = [group for group in groups if len({record["reward"] for record in group}) > 1]
        assert row["completions/trained"] == 3 * len(signal)
        assert row["tokens/trained"] == row["tokens/sampled"] - row["tokens/flat"]
        assert row["flat_groups"] == pytest.approx(1 - len(signal) / len(groups))
    assert 0 < sum(row["flat_groups"] for row in rows) < 4


def test_a_cold_start_needs_worked_solutions(saved_models, tmp_path):
    data = tmp_path / "own.jsonl"
    rows = [{"question": f"{i} + 1?", "answer": i + 1} for i in range(30)]
    data.write_text("\n".join(map(json.dumps, rows)))
    argv = [*TINY, "--dataset_name", "gsm8k", "--dataset_path", str(data), "--output_dir",
            str(tmp_path / "run"), "--model_name", str(saved_models["qwen2"])]  # fmt: skip
    with pytest.raises(UserError, match="--cold_start_steps 1: the data has no worked solutions"):
        main.train(parse_args(argv))
    main.train(parse_args([*argv, "--cold_start_steps", "0"]))


def environment():
    return {**os.environ, "HF_TOKEN": "hf_canary1234567890", "HF_HUB_OFFLINE": "1"}


def test_ctrl_c_ends_a_run_in_one_line(saved_models, tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, ROOT / "main.py", *TINY, "--num_train_iters", "100000", "--model_name",
         saved_models["qwen2"], "--output_dir", run],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "interrupted" in errors.splitlines()[-1]
    assert Series(run).metrics["reward"]


def test_a_reward_function_that_fails_ends_the_run_with_its_name(
    saved_models, tmp_path, monkeypatch
):
    def unlucky(completion, problem):
        raise KeyError("surprise")

    monkeypatch.setattr(evaluator, "REWARD_FUNCTIONS", [unlucky])
    argv = [*TINY, "--short_eval_iterations", "0", "--model_name", str(saved_models["qwen2"]),
            "--output_dir"]  # fmt: skip
    with pytest.raises(UserError, match=r"unlucky raised KeyError.*completion"):
        main.train(parse_args([*argv, str(tmp_path / "one")]))
    # One that gets through the evaluation and fails in a step names the file of completions.
    monkeypatch.setattr(main, "evaluate_policy", lambda *a: ({"accuracy": 0.0, "problems": 1}, []))
    with pytest.raises(UserError, match=r"see .*step_00000.jsonl") as raised:
        main.train(parse_args([*argv, str(tmp_path / "two")]))
    assert Path(str(raised.value).split("see ")[1]).exists()


@pytest.mark.slow
def test_the_real_command_trains_the_embedded_model(tmp_path):
    """SmolLM2-135M itself, through the command line: the demo with tiny numbers."""
    run = tmp_path / "demo"
    done = subprocess.run(
        [sys.executable, ROOT / "main.py", "--preset", "cpu", "--questions_per_step", "2",
         "--group_size", "2", "--num_train_iters", "1", "--cold_start_steps", "1",
         "--eval_problems", "4", "--short_eval_iterations", "0", "--max_completion_length", "6",
         "--output_dir", run],
        capture_output=True, text=True, env=environment(), timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "held-out, greedy" in done.stdout and "overview.png" in done.stdout
    for path in [path for path in run.rglob("*") if path.suffix in (".json", ".jsonl")]:
        assert "hf_canary" not in path.read_text(), path
    assert "hf_canary" not in done.stdout + done.stderr
    assert lines(run / "metrics.jsonl")[0]["mismatch"] < 1e-4
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert model.num_parameters() == 134_515_008
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
