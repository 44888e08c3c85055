"""A whole run of self-play, from the command line on, with a toy for a model."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, make_args, make_model, make_setup, make_tokenizer
from safetensors.torch import load_file
from several import launch

import main
from evaluation import games
from evaluation.games import measure
from launch import commands
from launch.loading import evaluate_and_save
from launch.parser import parse_args
from records.run import Run
from tasks import load_task
from training.processes import make_accelerator


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# Whoever says four loses. Of what a toy says, a third is no legal move.
GAME = """
def start(rng): return 0, 0
def starts(): return [(0, 0)]
def mover(state): return state[1]
def moves(state): return (1, 2)
def play(state, move): return state[0] + move, 1 - state[1]
def payoff(state): return None if state[0] < 4 else (1, -1) if state[1] == 0 else (-1, 1)
def prompt(state): return f"{state[0]}?"
def say(state, move): return "a" * move
def read(completion): return len(completion) % 3
def perfect(state): return {1: 1.0, 2: 0.0} if state[0] == 2 else {1: 0.5, 2: 0.5}
"""


@pytest.fixture
def flags(saved_models, tmp_path, monkeypatch):
    """flags(run's directory, more of them) of a run of this game, with few deals and no figures."""
    monkeypatch.setattr(games, "DEALS", 4)
    monkeypatch.setattr(Run, "drawn_meanwhile", lambda *_, **__: nullcontext())
    file = tmp_path / "four.py"
    file.write_text(GAME)

    def parsed(path, *more):
        return parse_args([
            "--preset", "cpu", "--dataset_name", str(file), "--output_dir", str(path),
            "--model_name", str(saved_models["qwen2"]), "--questions_per_step", "6",
            "--group_size", "3", "--num_train_iters", "2", "--cold_start_steps", "1",
            "--learning_rate", "1e-3", "--eval_iterations", "1", "--kl_beta", "0.05",
            "--max_completion_length", "6", "--temperature", "1", *more,
        ])  # fmt: skip

    return parsed


def test_a_run_plays_itself_is_measured_and_goes_on_where_it_stopped(flags, tmp_path):
    """With a pool, so that the earlier policy has to be the same again too."""
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    main.train(flags(whole, "--opponents", "pool"))
    main.train(flags(halved, "--opponents", "pool", "--num_train_iters", "1"))
    main.train(parse_args(["--resume", "--output_dir", str(halved), "--num_train_iters", "2"]))
    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (whole, halved))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    rows = lines(whole / "metrics.jsonl")
    assert [row["reward"] for row in rows] == [row["rewards/outcome"] for row in rows]
    assert all(row["seconds/playing"] > 0 for row in rows)
    step = lines(whole / "completions" / "step_00001.jsonl")
    assert len(step) == 18 and {row["reward"] for row in step} == {-1, 0, 1}
    for row in lines(whole / "eval.jsonl"):
        assert 0 <= row["exploitability"] <= 1
        assert row["against_random_low"] <= row["against_random"] <= row["against_random_high"]
        assert "lenient_accuracy" not in row
    before, *_, after = lines(whole / "eval.jsonl")
    deals = [
        next(row["won_per_deal"] for row in lines(whole / f"completions/games_{step:05d}.jsonl")
             if row.get("against") == "random" and "won_per_deal" in row)
        for step in (0, 2)
    ]  # fmt: skip
    more = torch.tensor(deals[1]) - torch.tensor(deals[0])
    assert after["gain/against_random"] == pytest.approx(more.mean().item())
    assert after["gain/against_random"] == pytest.approx(
        after["against_random"] - before["against_random"]
    )
    half = 1.96 * more.std().item() / len(more) ** 0.5
    assert after["gain/against_random_high"] - after["gain/against_random"] == pytest.approx(
        half, rel=1e-3
    )
    assert "gain/against_random" not in before
    for done in (0, 1, 2):
        records = lines(whole / "completions" / f"games_{done:05d}.jsonl")
        assert [r["position"] for r in records if "position" in r] == ["0?", "1?", "2?", "3?"]
        assert {r["against"] for r in records if "turns" in r} == {"random", "perfect"}


def drawn(file):
    """What a step draws and earns, and an evaluation finds, in however many processes there are."""
    task = load_task(make_args(dataset_name=str(file), dataset_path=None, evaluator=None))
    tokenizer = make_tokenizer()
    args = make_args(
        questions_per_step=5, group_size=3, max_completion_length=6, tremble=0.2, opponents="self"
    )
    model = make_model(vocab_size=len(tokenizer))
    setup = make_setup(model, args, make_accelerator(), tokenizer, task=task)
    run = SimpleNamespace(save_step=lambda *_: None)
    problems, rollouts, rewards = main.draw_groups(setup, None, 3, run)
    figures, games = measure(setup)
    return [p.question for p in problems], rollouts.texts, rewards.total.tolist(), figures, games


def test_two_processes_play_the_games_of_one(flags, tmp_path):
    file = tmp_path / "four.py"
    [alone] = launch(1, lambda: drawn(file))
    assert len(set(alone[0])) > 1 and len({value for row in alone[2] for value in row}) > 1
    for process in launch(2, lambda: drawn(file)):
        assert process[:3] == alone[:3] and process[4] == alone[4]
        assert process[3] == pytest.approx(alone[3])


def test_a_model_is_evaluated_as_a_run_measures_it(flags, saved_models, tmp_path):
    asked = ["evaluate", str(saved_models["qwen2"]), "--preset", "cpu", "--dataset_name",
             str(tmp_path / "four.py"), "--max_completion_length", "6", "--temperature", "1",
             "--output_dir", str(tmp_path / "evaluated")]  # fmt: skip
    evaluate_and_save(commands.parse_command(asked))
    main.train(flags(tmp_path / "run", "--num_train_iters", "0", "--cold_start_steps", "0"))
    alone, [first] = (lines(tmp_path / run / "eval.jsonl") for run in ("evaluated", "run"))
    first.pop("seconds/evaluation"), alone[0].pop("seconds/evaluation")
    assert alone == [first]


def test_a_group_of_moves_earns_what_the_games_end_in(flags, saved_models, tmp_path, command):
    flags(tmp_path / "run")
    asked = ["group", saved_models["qwen2"], "--preset", "cpu", "--dataset_name",
             tmp_path / "four.py", "--max_completion_length", 6, "--temperature", 1]  # fmt: skip
    status, out, error = command(*asked, "--question", "0", "--group_size", "12")
    assert status == 0, error
    assert out.count("outcome -1") + out.count("outcome 0") + out.count("outcome 1") == 12
    assert out.count("outcome -1") in range(1, 12) and "All earned the same" not in out
    status, _, error = command(*asked, "3?", "--group_size", "12")
    assert status == 2 and "by --question N" in error and error.count("\n") == 1


def test_the_loop_of_training_knows_of_no_game():
    source = (ROOT / "main.py").read_text()
    loop = source.partition("def train(args)")[2].partition("\ndef ")[0]
    assert loop.count("game") == 2  # one line: what is measured of a game, and where it is kept
