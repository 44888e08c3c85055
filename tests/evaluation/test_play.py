"""A person against the policy: who is asked what, and how it ends."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT, make_args
from terminal import CONTROL, recorded

from evaluation import play as playing
from evaluation.play import play_with_a_person


@pytest.fixture
def game_of(monkeypatch, capsys):
    """Plays Kuhn poker with what a person and the model say, in turn. What is on the screen."""

    def played(person, model, seed=0):
        typed, said = iter(person), iter(model)

        def asked(prompt):
            print(prompt, end="")
            line = next(typed, None)
            if line is None:
                raise EOFError
            print(line)
            return line

        monkeypatch.setattr("builtins.input", asked)
        monkeypatch.setattr(playing, "load", lambda *_: None)
        monkeypatch.setattr(playing, "policy_player", lambda _: lambda _: [next(said)])
        args = make_args(dataset_name="kuhn", dataset_path=None, seed=seed, evaluator=None)
        play_with_a_person(args)
        return capsys.readouterr().out

    return played


def test_a_typo_is_asked_again_and_the_end_of_input_ends_it(game_of):
    screen = game_of(["bett", "call", " bet "], ["My King folds.", "My King bets."])
    again = re.findall(r"No move: say My (\w+) checks\., or My (\w+) bets\.", screen)
    assert len(again) == 2 and again[0][0] == again[0][1]
    assert "the model: My King folds." in screen and "You win 1." in screen
    assert re.search(
        r"it knew: You hold the \w+\. Your opponent bets\. It said: My King folds\.", screen
    )
    assert "1 game: +1" in screen
    # The second game is the model's to begin; it is broken off.
    assert "--- game 2" in screen and screen.endswith("\n")


def test_the_person_has_both_seats_by_turns(game_of):
    screen = game_of(["checks", "fold", "fold"], ["My Jack bets.", "My Jack bets."])
    told = re.findall(r"^You hold the \w+\. (.*)$", screen, re.MULTILINE)
    assert told[:3] == ["You act first.", "You checked, your opponent bets.", "Your opponent bets."]
    assert "2 games: -2" in screen


def test_what_the_model_writes_is_shown_as_text_and_costs_it_alone(game_of):
    screen = game_of(["bet"], ["\x1b[2Jboo", "My Jack bets."])
    assert "\x1b" not in screen and "That is no legal move: the model loses" in screen
    assert "1 game: +0" in screen


def test_no_game_is_said_in_a_line(saved_models):
    command = [sys.executable, "main.py", "play", saved_models["qwen2"], "--dataset_name"]
    end = subprocess.run([*command, "arithmetic"], cwd=ROOT, capture_output=True, text=True)
    assert (end.returncode, end.stdout) == (2, "")
    assert "--dataset_name arithmetic: is no game; name one, e.g. kuhn" in end.stderr
    assert end.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("key", "status"), [("\x04", 0), ("\x03", 130)])
def test_in_a_terminal_it_ends_cleanly(key, status, saved_models, monkeypatch):
    """Ctrl-D and Ctrl-C, typed where it asks for a move."""
    model = str(saved_models["qwen2"])
    command = [sys.executable, str(ROOT / "main.py"), "play", model, "--dataset_name", "kuhn"]
    code, writes = recorded(command, typed=["nonsense\n", key])
    screen = CONTROL.sub("", "".join(text for _, text in writes))
    assert code == status
    assert "No move: say" in screen and "Traceback" not in screen
