"""Whole runs whose sides answer each other, from the command line on, with a toy for a model."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import make_args, make_model, make_setup, make_tokenizer
from safetensors.torch import load_file
from several import launch

import main
from launch.parser import parse_args
from records.run import Run
from rldatasets import Problems, Transcript
from tasks import load_task
from training.processes import make_accelerator


def talkative():
    """A model that ends a turn after a few tokens, and its tokenizer."""
    tokenizer = make_tokenizer()
    model = make_model("qwen2", vocab_size=len(tokenizer), tie_word_embeddings=False)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 4
    return model, tokenizer


@pytest.fixture
def flags(tmp_path, monkeypatch):
    """flags(run's directory, more of them) of a run of debates with rebuttals."""
    monkeypatch.setattr(Run, "drawn_meanwhile", lambda *_, **__: nullcontext())
    for part in talkative():
        part.save_pretrained(tmp_path / "toy")

    def parsed(path, *more):
        return parse_args([
            "--preset", "cpu", "--dataset_name", "debate", "--output_dir", str(path),
            "--model_name", str(tmp_path / "toy"), "--questions_per_step", "4",
            "--group_size", "3", "--num_train_iters", "2", "--learning_rate", "1e-2",
            "--rebuttals", "1", "--max_prompt_length", "620", "--max_completion_length", "400",
            "--eval_problems", "4", "--referee", "start", "--referee_anyway", *more,
        ])  # fmt: skip

    return parsed


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_run_of_debates_goes_on_bit_for_bit_where_it_stopped(flags, tmp_path):
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    main.train(flags(whole))
    main.train(flags(halved, "--num_train_iters", "1"))
    main.train(parse_args(["--resume", "--output_dir", str(halved), "--num_train_iters", "2"]))
    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (whole, halved))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    first, last = (load_file(path / "model.safetensors")
                   for path in (tmp_path / "toy", whole / "model"))  # fmt: skip
    assert not all(torch.equal(first[name], last[name]) for name in first)
    steps = [lines(run / "completions" / "step_00001.jsonl") for run in (whole, halved)]
    assert steps[0] == steps[1]
    assert any(len(row.get("turns", ())) == 3 for row in steps[0])  # opening, what it hears, answer
    for run in (whole, halved):
        after = lines(run / "eval.jsonl")[-1]
        assert after["debate/accuracy_low"] <= after["debate/accuracy"] <= 1
        assert after["debate/without"] == lines(run / "eval.jsonl")[0]["debate/without"]


def drawn():
    """What a step's debates are, and earn for being right, in however many processes there are."""
    flags = {"dataset_name": "debate", "dataset_path": None, "evaluator": None, "seed": 0}
    task = load_task(make_args(**flags))
    task = SimpleNamespace(**{**vars(task), "reward_functions": [length]})
    model, tokenizer = talkative()
    args = make_args(
        questions_per_step=4, group_size=3, max_completion_length=400, rebuttals=1, **flags
    )
    setup = make_setup(model, args, make_accelerator(), tokenizer, task=task)
    run = SimpleNamespace(save_step=lambda *_: None)
    problems = Problems(task.problems("train")[:20], 0, together=task.together)
    asked, rollouts, rewards = main.draw_groups(setup, problems, 3, run)
    turns = [[getattr(text, "turns", (text,)) for text in texts] for texts in rollouts.texts]
    assert any(isinstance(text, Transcript) for texts in rollouts.texts for text in texts)
    return (
        [p.question for p in asked],
        turns,
        rewards.total.tolist(),
        int(rollouts.completion_mask.sum()),
    )


def length(completion, problem):
    return float(len(completion))


def test_two_processes_debate_as_one_does():
    [alone] = launch(1, drawn)
    assert len(alone[0]) == 4 and {len(turns) for texts in alone[1] for turns in texts} >= {3}
    for process in launch(2, drawn):
        assert process == alone
