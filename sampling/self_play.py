"""Self-play: a step's questions are positions that the policy reached, its rewards how games ended.

A group is G attempts at one and the same decision: a position of a game that the policy played
against itself, and G moves there. A move earns what its player has won when the game is played on
from it by the same policy. So the group's mean is the value of this position to this player: the
advantage of a seat, or of the cards, cancels exactly, and no move is ever compared with one of the
other player's. Both players in one group, as whole games would have it, is wrong credit without an
error. Moves of the games before and after are not trained on; they come up as positions themselves.

All games of a step are in lock-step: the policy is asked once a ply, for all of them. Whatever is
drawn in a game comes from the game's own generator, so from (seed, step) alone.

Q questions per step, G completions per question.
"""

import random
from dataclasses import dataclass, field, replace

import torch

from rldatasets import Problem
from sampling.groups import sample_groups
from sampling.rollouts import without_thoughts
from tasks.games import LONGEST
from training.processes import everyones, own_part
from utils import UserError, mixed_seed


@dataclass
class Match:
    """One game being played. A player is a function from Matches, in all of which it is to move, to
    what it says in each, a completion."""

    state: object
    players: tuple  # of player 0 and player 1
    rng: random.Random
    turns: list = field(default_factory=list)  # (state, what was said)
    fault: int | None = None  # who said what is no legal move, which ends the game


def take_turn(game, match, said):
    """The mover says this: the match goes on, or ends by a fault."""
    move = game.read(said)
    match.turns.append((match.state, said))
    if move in game.moves(match.state):
        match.state = game.play(match.state, move)
    else:
        match.fault = game.mover(match.state)


def play(game, matches):
    """Play these Matches to their ends, in lock-step: a player is asked once a ply. Raises
    UserError where one does not end."""
    while going := [m for m in matches if m.fault is None and game.payoff(m.state) is None]:
        if max(len(match.turns) for match in going) >= LONGEST:
            raise UserError(f"a game goes on after {LONGEST} moves: see its payoff")
        asked = {}
        for match in going:
            asked.setdefault(match.players[game.mover(match.state)], []).append(match)
        for player, theirs in asked.items():
            for match, said in zip(theirs, player(theirs)):
                take_turn(game, match, said)


def winnings(game, match):
    """What (player 0, player 1) have from a Match that is over. Who is at fault pays the forfeit,
    and the other, who did nothing for it, gets nothing."""
    if match.fault is None:
        return game.payoff(match.state)
    return tuple(-game.FORFEIT if seat == match.fault else 0.0 for seat in (0, 1))


# --- players -------------------------------------------------------------------------------------


def drawing_player(game, policy):
    """A player that draws from policy(state), {move: probability}."""

    def player(matches):
        drawn = []
        for match in matches:
            shares = policy(match.state)
            [move] = match.rng.choices([*shares], [*shares.values()])
            drawn.append(game.say(match.state, move))
        return drawn

    return player


def random_moves(game):
    """The policy that takes all legal moves alike."""
    return lambda state: dict.fromkeys(game.moves(state), 1 / len(game.moves(state)))


def trembling(game, player, share):
    """The same player, whose move is a random legal one in this share of cases (R. Selten's
    trembling hand): play comes by positions that the player itself would never reach, so that it
    goes on learning what to do there."""
    stray = drawing_player(game, random_moves(game))

    def trembles(matches):
        shaken = [match.rng.random() < share for match in matches]
        steady = [match for match, is_shaken in zip(matches, shaken) if not is_shaken]
        said = iter(player(steady) if steady else ())
        return [
            stray([match])[0] if is_shaken else next(said)
            for match, is_shaken in zip(matches, shaken)
        ]

    return trembles


def policy_player(setup):
    """The policy, which is asked as in training: its sampled text is what it says."""

    def player(matches):
        problems = [Problem(setup.task.game.prompt(match.state), "", "") for match in matches]
        seeds = [match.rng.getrandbits(63) for match in matches]
        sampled = without_thoughts(sample_groups(setup, problems, seeds, group_size=1), setup)
        return [text for [text] in sampled.texts]

    return player


def sides(setup):
    """(the learner, its opponents), as players. With --opponents pool these are the learner itself
    and the reference: an earlier policy, which memory and checkpoints hold anyway."""
    args, game = setup.args, setup.task.game
    learner = trembling(game, policy_player(setup), args.tremble)
    if args.opponents == "self":
        return learner, [learner]
    earlier = policy_player(replace(setup, policy=setup.reference))
    return learner, [learner, trembling(game, earlier, args.tremble)]


# --- a step --------------------------------------------------------------------------------------


def reached(game, learner, opponents, seeds):
    """A state of each of len(seeds) games: one in which the learner, who has either seat, is to
    move."""
    matches = []
    for seed in seeds:
        rng = random.Random(seed)
        players = seated(learner, rng.choice(opponents), rng.randrange(2))
        matches.append(Match(game.start(rng), players, rng))
    play(game, matches)
    states = []
    for match in matches:
        its = [state for state, _ in match.turns if match.players[game.mover(state)] is learner]
        # None where the other side's first move ended it.
        states.append(match.rng.choice(its or [match.turns[0][0]]))
    return states


def seated(learner, opponent, seat):
    return (learner, opponent) if seat == 0 else (opponent, learner)


def outcomes(game, learner, opponents, groups):
    """What each move earns its player. groups: Q times (state, seed, G texts). Returns (Q, G)."""
    matches = []
    for state, seed, texts in groups:
        for g, text in enumerate(texts):
            rng = random.Random(mixed_seed(seed, "played on", g))
            players = seated(learner, rng.choice(opponents), game.mover(state))
            matches.append(Match(state, players, rng))
            take_turn(game, matches[-1], text)
    play(game, matches)
    earned = iter(winnings(game, match) for match in matches)
    rows = [[next(earned)[game.mover(state)] for _ in texts] for state, _, texts in groups]
    return torch.tensor(rows, dtype=torch.float64, device="cpu")  # (Q, G)


def positions(setup, draw):
    """The Q Problems of a draw: positions that games of the policy with itself came to."""
    args, game = setup.args, setup.task.game
    seeds = [mixed_seed(args.seed, draw, q, "game") for q in range(args.questions_per_step)]
    mine = own_part(seeds, setup.accelerator)
    with setup.stopwatch("playing"):
        parts = everyones(reached(game, *sides(setup), mine), setup.accelerator)
    states = [state for part in parts for state in part]
    return [Problem(game.prompt(state), "", "", {"state": state}) for state in states]


def played_on(setup, problems, rollouts, seeds):
    """What the moves of these Rollouts earn, (Q, G): every game is played to its end."""
    texts = without_thoughts(rollouts, setup).texts
    groups = [(p.extra["state"], seed, said) for p, seed, said in zip(problems, seeds, texts)]
    with setup.stopwatch("playing"):
        return outcomes(setup.task.game, *sides(setup), groups)
