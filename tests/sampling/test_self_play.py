"""Self-play with players that are tables: the same functions as a model's, in a second."""

import random
from statistics import fmean

import pytest
import torch

from benchmarks.self_play_tables import Table, game_named, trained
from evaluation.games import exploitability
from sampling.self_play import (
    Match,
    drawing_player,
    outcomes,
    play,
    random_moves,
    reached,
    trembling,
    winnings,
)
from tasks.games import best_moves, positions
from utils import mixed_seed

KUHN, NIM = game_named("kuhn"), game_named("nim")


def share_of_best_moves(table):
    """Of the positions of Nim in which one move is best, those in which the table prefers it."""
    right = []
    for prompt, state in positions(NIM).items():
        best = best_moves(NIM, state)
        if len(best) < len(NIM.moves(state)):
            right.append(max(table.logits[prompt], key=table.logits[prompt].get) in best)
    return fmean(right)


@pytest.mark.parametrize("seed", range(6))
def test_nim_is_learnt_from_nothing_but_play(seed):
    table = Table(NIM)
    assert fmean(table.at(p).get(s[0] % 4, 0) for p, s in positions(NIM).items() if s[0] % 4) < 0.5
    for step in range(80):
        table.step(mixed_seed(seed, step), rate=1.0, scale="std")
    assert share_of_best_moves(table) >= 0.85


@pytest.mark.parametrize("seed", range(6))
def test_the_mean_policy_of_kuhn_poker_comes_close_to_balance(seed):
    assert exploitability(KUHN, Table(KUHN).policy) == pytest.approx(0.458, abs=1e-3)
    settings = {"scale": "none", "tremble": 0.1, "entropy_bonus": 0.1}
    _, policy = trained(KUHN, seed, 160, **settings)
    assert exploitability(KUHN, policy) <= 0.15


@pytest.mark.parametrize("game", [KUHN, NIM])
def test_a_group_is_one_players_attempts_at_one_decision(game):
    states, advantages = Table(game).step(3, rate=0.0, scale="std", questions=32)
    assert {game.mover(state) for state in states} == {0, 1}
    assert advantages.sum(-1).abs().max() < 1e-9
    assert advantages.abs().max() > 0.5


def always(game, choose):
    """A player that says, in a state, what `choose` of it is."""
    return lambda matches: [choose(match.state) for match in matches]


def test_a_move_earns_its_own_players_outcome_in_either_seat():
    """From three stones, taking three wins and one or two lose to an opponent who takes the rest,
    whoever of the two is to move."""
    rest = always(NIM, lambda state: NIM.say(state, state[0]))
    texts = ["I take 1.", "I take 2.", "I take 3."]
    groups = [((3, seat), 5, texts) for seat in (0, 1)]
    assert outcomes(NIM, rest, [rest], groups).tolist() == [[-1, -1, 1]] * 2


def test_swapping_the_seats_of_a_symmetric_game_changes_nothing():
    table = Table(NIM)
    table.logits = {p: {m: random.Random(p).gauss(0, 1) * m for m in moves}
                    for p, moves in table.logits.items()}  # fmt: skip
    learner = trembling(NIM, drawing_player(NIM, table.policy), 0.2)
    texts = ["I take 1.", "I take 2.", "I take 3.", "I take 2.", "nonsense"]
    first, second = ([((n, seat), n, texts) for n in range(4, 22)] for seat in (0, 1))
    ours = outcomes(NIM, learner, [learner], first)
    assert torch.equal(ours, outcomes(NIM, learner, [learner], second))
    assert {-1.0, 1.0} <= set(ours.flatten().tolist())


def test_an_illegal_move_loses_for_its_player_and_pays_the_other_nothing():
    state = (("Queen", "Jack"), ())
    silent = always(KUHN, lambda state: "What now?")
    checks = always(KUHN, lambda state: "My Queen checks.")
    groups = [
        (state, 0, ["My Queen bets.", "My Queen calls.", "", "My Jack checks. My Jack bets."])
    ]
    # The other side errs after the bet: a draw. What is no legal move costs the forfeit.
    assert outcomes(KUHN, checks, [silent], groups).tolist() == [[0, -2, -2, -2]]
    # One's own mistake later in the game costs it too.
    then_bets = always(KUHN, lambda state: "My Queen bets.")
    assert outcomes(KUHN, silent, [then_bets], [(state, 0, ["My Queen checks."])]).tolist() == [
        [-2]
    ]
    match = Match(state, (silent, checks), random.Random(0))
    play(KUHN, [match])
    assert (match.fault, winnings(KUHN, match)) == (0, (-2, 0))


def test_all_games_are_played_in_lock_step_a_call_a_ply():
    calls = []

    def player(matches):
        calls.append(len(matches))
        return [NIM.say(match.state, 1) for match in matches]

    matches = [Match((n, n % 2), (player, player), random.Random(n)) for n in (2, 5, 5, 9)]
    play(NIM, matches)
    assert calls == [4, 4, 3, 3, 3, 1, 1, 1, 1]
    assert [winnings(NIM, match) for match in matches] == [(-1, 1), (-1, 1), (-1, 1), (-1, 1)]


def test_a_game_is_the_same_whatever_is_played_beside_it():
    table = Table(KUHN)
    learner = trembling(KUHN, drawing_player(KUHN, table.policy), 0.2)
    seeds = [mixed_seed(1, n) for n in range(40)]
    together = reached(KUHN, learner, [learner], seeds)
    apart = reached(KUHN, learner, [learner], seeds[:7]) + reached(
        KUHN, learner, [learner], seeds[7:]
    )
    assert together == apart
    groups = [
        (state, seed, ["My Queen bets.", "My Queen checks."])
        for state, seed in zip(together, seeds)
    ]
    both = outcomes(KUHN, learner, [learner], groups)
    assert torch.equal(both[7:], outcomes(KUHN, learner, [learner], groups[7:]))


def test_a_pool_has_the_other_side_played_by_an_earlier_policy_in_half_of_the_games():
    now = always(NIM, lambda state: "I take 1.")
    earlier = always(NIM, lambda state: "I take 3.")
    groups = [((n, n % 2), n, ["I take 1."] * 4) for n in range(4, 54)]
    matches_won = outcomes(NIM, now, [now, earlier], groups)
    assert 0.2 < (matches_won != outcomes(NIM, now, [now], groups)).float().mean() < 0.7
    # The position is always one in which the learner moves.
    seen = []
    watched = lambda matches: seen.extend(m.state for m in matches) or now(matches)  # noqa: E731
    states = reached(NIM, watched, [earlier], range(64))
    assert set(states) <= set(seen)
    assert {NIM.mover(state) for state in states} == {0, 1}


def test_a_trembling_hand_errs_as_often_as_it_is_told_to():
    still = always(NIM, lambda state: "I take 1.")
    matches = [Match((9, 0), (), random.Random(n)) for n in range(3000)]
    said = trembling(NIM, still, 0.3)(matches)
    # A random move is the same one in a third of the cases.
    assert fmean(text != "I take 1." for text in said) == pytest.approx(0.2, abs=0.03)
    assert set(trembling(NIM, still, 0)(matches)) == {"I take 1."}
    assert random_moves(NIM)((2, 0)) == {1: 0.5, 2: 0.5}
