"""The rules of the games, and the problems that come of them."""

import itertools
import random
from dataclasses import replace

import pytest
from conftest import make_args

from launch.parser import parse_args
from sampling.self_play import Match, play
from tasks import check_weights, load_task
from tasks.games import NAMES, positions
from utils import UserError


def task_named(name, **more):
    return load_task(
        make_args(dataset_name=name, dataset_path=None, seed=0, evaluator=None, **more)
    )


KUHN, NIM = task_named("kuhn"), task_named("nim")


def ends(game, state):
    """{the moves of a game: what player 0 has of it}, of all games from a state."""
    paid = game.payoff(state)
    if paid is not None:
        assert sum(paid) == 0
        return {(): paid[0]}
    return {
        (move, *rest): value
        for move in game.moves(state)
        for rest, value in ends(game, game.play(state, move)).items()
    }


@pytest.mark.parametrize(
    ("cards", "sign"), [(("King", "Jack"), 1), (("Jack", "Queen"), -1), (("Queen", "Jack"), 1)]
)
def test_kuhn_poker_pays_as_in_the_book(cards, sign):
    assert ends(KUHN.game, (cards, ())) == {
        ("check", "check"): sign,
        ("check", "bet", "fold"): -1,
        ("check", "bet", "call"): 2 * sign,
        ("bet", "fold"): 1,
        ("bet", "call"): 2 * sign,
    }


def test_nim_is_won_by_the_last_stone():
    games = ends(NIM.game, (4, 0))
    assert games[1, 1, 1, 1] == games[3, 1] == -1
    assert games[1, 2, 1] == games[2, 1, 1] == 1
    assert games[1, 3] == games[2, 2] == -1
    assert len(games) == 7  # the ways to write 4 as a sum of 1, 2 and 3


def wins(stones):
    return any(not wins(stones - taken) for taken in range(1, min(3, stones) + 1))


def test_perfect_nim_wins_wherever_it_can():
    for stones in range(1, 22):
        for move, share in NIM.game.perfect((stones, 0)).items():
            assert (share > 0) == (not wins(stones - move) or not wins(stones))


@pytest.mark.parametrize("task", [KUHN, NIM])
def test_what_is_said_is_what_is_read(task):
    game = task.game
    for state in positions(game).values():
        for move in game.moves(state):
            assert game.read(game.say(state, move)) == move
            assert not any(game.say(state, move) in text for text in (game.prompt(state), ""))
    for text in (
        "",
        "hm",
        "My Jack checks. My Jack bets.",
        "I take 2 or 3.",
        "99999999999",
        "My Ace folds.",
        "I fold.",
    ):
        assert game.read(text) is None


@pytest.mark.parametrize(("task", "count"), [(KUHN, 12), (NIM, 21)])
def test_a_cold_start_teaches_every_legal_move_of_every_position_alike(task, count):
    train = task.problems("train")
    asked = {}
    for problem in train:
        asked.setdefault(problem.question, []).append(task.worked_answer(problem))
    assert len(asked) == count
    for question, answers in asked.items():
        state = positions(task.game)[question]
        assert sorted(answers) == sorted(task.game.say(state, m) for m in task.game.moves(state))


@pytest.mark.parametrize(("task", "count"), [(KUHN, 7), (NIM, 15)])
def test_decisive_positions_have_one_best_move_that_counts_as_right(task, count):
    test = task.problems("test")
    assert len(test) == len({problem.question for problem in test}) == count
    for problem in test:
        state = problem.extra["state"]
        right = [
            m for m in task.game.moves(state) if task.is_correct(task.game.say(state, m), problem)
        ]
        assert [task.game.say(state, move) for move in right] == [problem.answer]
        assert not task.is_correct("", problem)


def test_nobody_says_which_moves_are_legal():
    for task, words in ((KUHN, ("fold", "call", "check.", "bet.")), (NIM, ("take",))):
        for prompt in positions(task.game):
            assert not any(
                word in prompt for word in words if f"opponent {word[:-1]}s" not in prompt
            )


GAME = """
def start(rng): return 0
def mover(state): return state % 2
def moves(state): return (1, 2)
def play(state, move): return state + move
def payoff(state): return (1, -1) if state > 3 else None
def prompt(state): return f"{state}?"
def say(state, move): return str(move)
def read(completion): return int(completion) if completion.isdigit() else None
"""


def test_ten_lines_are_a_game(tmp_path):
    file = tmp_path / "count.py"
    file.write_text(GAME)
    task = task_named(str(file))
    assert [problem.question for problem in task.problems("test")] == [
        "0?", "1?", "2?", "3?"
    ]  # fmt: skip
    assert [problem.question for problem in task.problems("train")[:2]] == ["0?", "0?"]
    assert task.is_correct("2", task.problems("test")[0])
    assert task.game.FORFEIT == 1


def test_a_game_of_one_s_own_has_the_settings_that_held_in_kuhn_poker(tmp_path):
    file = tmp_path / "count.py"
    file.write_text(GAME)
    own, kuhn, other = (
        vars(parse_args(["--preset", "cpu", "--dataset_name", name, "--output_dir", "x"]))
        for name in (str(file), "kuhn", "countdown")
    )
    differing = {name for name in own if own[name] != kuhn[name]}
    assert differing == {"dataset_name", "max_completion_length"}
    assert (own["kl_beta"], own["advantage_scale"], other["kl_beta"]) == (0.5, "none", 0.0)


@pytest.mark.parametrize("missing", NAMES[:4])
def test_a_game_without_a_part_of_it_is_refused_by_name(tmp_path, missing):
    file = tmp_path / f"no_{missing}.py"
    file.write_text(GAME.replace(f"def {missing}(", "def another("))
    with pytest.raises(UserError, match=f"no_{missing}.py: a game needs {missing} too"):
        task_named(str(file))


def test_an_error_of_a_game_is_told_by_its_line(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text(GAME.replace("return state + move", "return state / 0"))
    with pytest.raises(UserError, match=r"broken.py:5: ZeroDivisionError: .*; mend this line"):
        task_named(str(file)).problems("train")


def test_a_reward_called_as_the_outcome_is_refused(tmp_path):
    file = tmp_path / "taken.py"
    mine = "def outcome(completion, problem): return 1.0\nREWARD_FUNCTIONS = [outcome]\n"
    file.write_text(GAME + mine)
    with pytest.raises(UserError, match=r"taken.py: how a game ends is a reward called outcome"):
        task_named(str(file))
    with pytest.raises(UserError, match="--reward_weights outcome: no such reward; there are none"):
        check_weights({"outcome": 2.0}, KUHN.reward_functions)


def test_a_game_that_does_not_end_is_told(tmp_path):
    file = tmp_path / "endless.py"
    file.write_text(GAME.replace("return state + move", "return state"))
    with pytest.raises(UserError, match="a game of random moves goes on after 1000"):
        task_named(str(file)).problems("train")


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("return str(move)", 'return f"{move}."', "say writes the move 1 as '1.', which read does"),
        ("return (1, 2)", "return ()", "the game has no legal move, or no mover 0 or 1, in 0"),
        ("return (1, -1)", "return 1", "payoff returned 1, neither None nor two numbers"),
    ],
)
def test_functions_that_contradict_each_other_are_told(tmp_path, right, wrong, said):
    file = tmp_path / "odd.py"
    file.write_text(GAME.replace(right, wrong))
    with pytest.raises(UserError, match=said):
        task_named(str(file)).problems("train")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ('FORFEIT = "2"', r"odd.py: FORFEIT = '2' is no number"),
        ("FORFEIT = 0.5", "FORFEIT = 0.5: a game may cost 1, so that an illegal move is the bett"),
        ("starts = [0]", r"odd.py: starts is no function; write it as def"),
        ("def starts(): return [[0]]", r"the state \[0\] can be no key of a dict; use tuples"),
        ("def starts(): return [9]", "a game is over before its first move, in 9"),
        (
            "def starts(): return [0]\ndef play(state, move): return (state + move) % 4",
            "a game of legal moves goes on after 1000: see its payoff",
        ),
        ("def perfect(state): return {1: float('nan')}", "perfect returned {1: nan} in 0, not the"),
        ("def start(rng): return 9", "a game is over before its first move, in 9"),
        ("def perfect(state): return {3: 1}", r"perfect returned {3: 1} in 0, not the probabili"),
        ("def perfect(state): return {1: 2}", r"perfect returned {1: 2} in 0, not the probabili"),
        ("def perfect(state): return 1", "perfect returned 1 in 0, not the probabilities of leg"),
    ],
)
def test_what_is_wrong_with_a_game_is_told_in_a_line(tmp_path, more, said):
    file = tmp_path / "odd.py"
    file.write_text(GAME + more + "\n")
    with pytest.raises(UserError, match=said):
        task_named(str(file)).problems("test")


def test_perfect_play_need_not_name_the_moves_that_it_never_takes(tmp_path):
    file = tmp_path / "one.py"
    file.write_text(GAME + "def perfect(state): return {2: 1}\n")
    task = task_named(str(file))
    assert task.game.perfect(0) == {1: 0.0, 2: 1}
    assert task.is_correct("2", task.problems("test")[0])
    assert not task.is_correct("1", task.problems("test")[0])


def test_a_game_may_say_itself_what_is_correct(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(GAME + "def is_correct(completion, problem): return completion == '1'\n")
    assert task_named(str(file)).is_correct("1", None)


def test_a_game_that_only_random_moves_end_is_told():
    game = replace(NIM.game, play=lambda state, move: (state[0], 1 - state[1]))
    with pytest.raises(UserError, match="a game goes on after 1000 moves"):
        play(game, [Match((2, 0), (lambda _: ["I take 1."],) * 2, random.Random(0))])


def test_every_deal_of_kuhn_poker_is_among_its_starts():
    cards = ("Jack", "Queen", "King")
    assert sorted(KUHN.game.starts()) == sorted(
        (pair, ()) for pair in itertools.permutations(cards, 2)
    )
