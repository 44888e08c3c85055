"""A game where other tasks go: asked by its positions alone, and its figures no shares."""

import math

import pytest
import torch
from conftest import make_args, make_model, make_setup, make_tokenizer

from evaluation import games
from evaluation.comparison import evaluation_table
from launch import commands
from tasks import load_task
from tasks.games import positions


@pytest.fixture
def said(saved_models, capsys):
    """Runs a command on Kuhn poker with a toy model: (status, what it prints, its errors)."""

    def run(name, *argv):
        flags = ("--preset", "cpu", "--dataset_name", "kuhn", "--max_completion_length", "4")
        status = commands.main([name, str(saved_models["qwen2"]), *flags, *map(str, argv)])
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize("name", ["chat", "group"])
def test_a_text_that_is_no_position_is_refused_in_a_line(said, name):
    status, out, error = said(name, "You hold an Ace.")
    assert (status, out) == (2, "") and error.count("\n") == 1
    assert "--dataset_name kuhn: a text is no position of its game" in error


def test_what_is_won_a_game_is_no_share():
    won = {"problems": 7, "accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6}
    won |= {"against_random": 1.5, "against_random_low": 1.25, "against_random_high": 1.75}
    table = "\n".join(evaluation_table({"a run": won}))
    assert "+1.500 [+1.250, +1.750]" in table and "50.0% [40.0%, 60.0%]" in table


def test_moves_too_unlikely_to_be_numbers_still_have_their_shares(monkeypatch):
    """exp(-1000) is 0: the shares come from the differences."""
    args = make_args(dataset_name="kuhn", dataset_path=None, seed=0, evaluator=None)
    task = load_task(args)
    count = sum(len(task.game.moves(state)) for state in positions(task.game).values())
    found = torch.tensor([[-1000.0], [-1000.0 - math.log(3)]] * (count // 2))
    monkeypatch.setattr(games, "logprobs_without_gradient", lambda *_: found)
    shares, legal = games.move_probabilities(
        make_setup(make_model(), args, tokenizer=make_tokenizer(), task=task)
    )
    assert legal == 0
    for of_position in shares.values():
        assert [*of_position.values()] == pytest.approx([0.75, 0.25], rel=1e-4)
