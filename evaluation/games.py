"""How well the policy plays: against players that never change, and against the best answer to it.

Nothing here is a reward. Against itself a policy always wins half; so it meets a player that takes
random legal moves and a perfect one, in both seats of the same deals, as it plays in training: by
sampled text. Where a game names all its first states, the probabilities of its legal answers say
exactly what it would win, and what the best answer to it would: exploitability.

A policy in here is a function from a state to {move: probability}.
"""

import random
import time
from collections import Counter
from dataclasses import replace
from functools import cache
from statistics import fmean

import torch
from torch.nn.utils.rnn import pad_sequence

from evaluation.significance import mean_interval, with_interval
from llms import chat_prompt
from rldatasets import Problem
from sampling.self_play import (
    Match,
    drawing_player,
    play,
    policy_player,
    random_moves,
    seated,
    winnings,
)
from sampling.turns import worked_ids
from tasks.games import best_moves, positions
from training.logprobs import logprobs_without_gradient
from training.processes import everyones, own_part
from utils import UserError, mixed_seed

DEALS = 1024  # each played from both seats
SHOWN = 3  # of the deals with each opponent, move by move


def played(setup, summary):
    """An evaluation's summary with what `measure` finds of a game, and its records; as it is, and
    none, for any other task."""
    if setup.task.game is None:
        return summary, []
    started = time.perf_counter()
    figures, records = measure(setup)
    # A move has no tags, and no number to be lenient with.
    kept = {k: v for k, v in summary.items() if not k.startswith(("lenient", "format"))}
    kept["seconds/evaluation"] += time.perf_counter() - started
    return {**kept, **figures}, records


def measure(setup):
    """(figures, records): numbers for eval.jsonl, and for the eye every position's moves and some
    games. Deals are the same at every evaluation and for every seed."""
    game = setup.task.game
    shares, legal = move_probabilities(setup)
    figures = {"legal_moves": legal}
    opponents = {"random": random_moves(game)}
    if game.perfect:
        opponents["perfect"] = game.perfect
        decisive = [
            sum(shares[prompt][move] for move in best_moves(game, state))
            for prompt, state in positions(game).items()
            if len(best_moves(game, state)) < len(game.moves(state))
        ]
        figures["best_moves"] = fmean(decisive)

    def policy(state):
        return shares[game.prompt(state)]

    if game.starts:
        figures["exploitability"] = exploitability(game, policy)
    records = [
        {"position": prompt, "moves": _said(game, state, shares[prompt]),
         "perfect": _said(game, state, game.perfect(state)) if game.perfect else None}
        for prompt, state in positions(game).items()
    ]  # fmt: skip
    for name, opponent in opponents.items():
        if game.starts:
            figures[f"exact/against_{name}"] = both_seats(game, policy, opponent)
        won, matches = sampled_games(setup, opponent, name)
        figures |= with_interval(f"against_{name}", *mean_interval(won))
        records.append({"against": name, "won_per_deal": won})
        records += [game_record(game, match, name) for match in matches]
    return figures, records


def _said(game, state, shares):
    return {game.say(state, move): share for move, share in shares.items()}


# --- move probabilities, exactly -----------------------------------------------------------------


def move_probabilities(setup):
    """({what the mover is told: {move: probability}}, mean share of the legal answers), at the
    sampling temperature, of every position.

    The answers are those that `say` writes: a legal move in other words counts as none here. Among
    them probabilities sum to 1.
    """
    game, device = setup.task.game, setup.accelerator.device
    tokenizer, task, places = setup.tokenizer, setup.task, positions(game)
    problems = [
        Problem(prompt, game.say(state, move), "")
        for prompt, state in places.items()
        for move in game.moves(state)
    ]
    prompts = [
        torch.tensor(chat_prompt(tokenizer, task.system_prompt, p.question), device=device)
        for p in problems
    ]
    answers = [
        torch.tensor(answer, device=device) for answer, _ in worked_ids(tokenizer, problems, task)
    ]
    ids = pad_sequence(answers, batch_first=True)  # (N, C), N answers
    lengths = [[len(answer)] for answer in answers]
    with setup.accelerator.autocast():
        logprobs = logprobs_without_gradient(
            setup.policy, prompts, lengths, ids, setup.args
        )  # (N, C)
    moves = [game.moves(state) for state in places.values()]
    parts = logprobs.double().sum(-1).cpu().split([*map(len, moves)])  # one for each position
    # Of logarithms, for all of the probabilities may be too small to be numbers.
    shares = {
        prompt: dict(zip(legal, part.softmax(0).tolist()))
        for prompt, legal, part in zip(places, moves, parts)
    }
    return shares, fmean(part.exp().sum().item() for part in parts)


def expected(game, policies):
    """What player 0 wins on average where both draw from these two policies, exactly."""

    @cache
    def value(state):
        paid = game.payoff(state)
        if paid is not None:
            return paid[0]
        shares = policies[game.mover(state)](state)
        return sum(share * value(game.play(state, move)) for move, share in shares.items() if share)

    return fmean(value(state) for state in game.starts())


def both_seats(game, policy, opponent):
    """What a policy wins a game from an opponent on average of both seats, exactly."""
    return (expected(game, (policy, opponent)) - expected(game, (opponent, policy))) / 2


def best_response(game, policy, seat):
    """What the best answer to a policy wins in this seat, exactly.

    It sees what its mover is told, not the state: of each such position it takes the move that is
    best on average over the states behind it, weighed by how often chance and the policy come
    there. Players remember what they were told (perfect recall), so that a position's later ones
    are settled first.
    """
    starts = [*game.starts()]
    behind = {}  # what the mover is told: {state: how often it comes up}
    layer = {state: count / len(starts) for state, count in Counter(starts).items()}
    while layer:
        following = {}
        for state, chance in layer.items():
            if game.payoff(state) is not None:
                continue
            if game.mover(state) == seat:
                states = behind.setdefault(game.prompt(state), {})
                states[state] = states.get(state, 0) + chance
                shares = dict.fromkeys(game.moves(state), 1.0)
            else:
                shares = policy(state)
            for move, share in shares.items():
                after = game.play(state, move)
                following[after] = following.get(after, 0) + chance * share
        layer = following

    settling = set()

    @cache
    def choice(prompt):
        if prompt in settling:
            raise UserError(f"a player is told {prompt!r:.60} twice in one game, so that no answer "
                            "to it is the best; tell it more")  # fmt: skip
        settling.add(prompt)
        states = behind[prompt]

        def total(move):
            return sum(chance * value(game.play(state, move)) for state, chance in states.items())

        return max(game.moves(next(iter(states))), key=total)

    @cache
    def value(state):
        paid = game.payoff(state)
        if paid is not None:
            return paid[seat]
        if game.mover(state) == seat:
            return value(game.play(state, choice(game.prompt(state))))
        shares = policy(state)
        return sum(share * value(game.play(state, move)) for move, share in shares.items() if share)

    return fmean(value(state) for state in starts)


def exploitability(game, policy):
    """What a policy loses to the best answers to it, a game on average of both seats: 0 for perfect
    play of a game whose winnings sum to 0 (half of NashConv)."""
    return (best_response(game, policy, 0) + best_response(game, policy, 1)) / 2


# --- games that are played -----------------------------------------------------------------------


def sampled_games(setup, opponent, name):
    """(what the policy won per deal, the matches of the first SHOWN ones): the mean over both seats
    of DEALS deals, as sampled text, against an opponent that draws from a policy."""
    game = setup.task.game
    learner, other = policy_player(setup), drawing_player(game, opponent)
    matches = []
    for deal in own_part(range(DEALS), setup.accelerator):
        state = game.start(random.Random(mixed_seed("deal", deal)))
        for seat in (0, 1):
            rng = random.Random(mixed_seed("match", name, deal, seat))
            matches.append(Match(state, seated(learner, other, seat), rng))
    play(game, matches)
    won = [winnings(game, match)[match.players.index(learner)] for match in matches]
    per_deal = [fmean(won[place : place + 2]) for place in range(0, len(won), 2)]
    shown = [replace(match, players=_names(match, learner, name), rng=None)
             for match in matches[: 2 * SHOWN]]  # fmt: skip
    parts = everyones((per_deal, shown), setup.accelerator)
    shown = [match for _, part in parts for match in part]
    return [value for part, _ in parts for value in part], shown[: 2 * SHOWN]


def _names(match, learner, name):
    return tuple("policy" if player is learner else name for player in match.players)


def game_record(game, match, against):
    """A game move by move, as plain values."""
    return {
        "against": against,
        "turns": [
            {"player": match.players[game.mover(state)], "told": game.prompt(state), "said": said}
            for state, said in match.turns
        ],
        "legal": match.fault is None,
        "won": winnings(game, match)[match.players.index("policy")],
    }
