"""Games of two players: what a task's file defines to be played, and the problems of a game.

A task's file that defines `payoff` is a game. A state holds everything, hidden cards and whose turn
it is included, and can be a key of a dict; what its mover is told of it is the question. States in
which the mover is told the same are one position.

start(rng)          a first state, chance included: whatever is dealt is dealt here
mover(state)        who moves, 0 or 1
moves(state)        the legal moves, a tuple
play(state, move)   the state after a legal move
payoff(state)       (what player 0 gets, what player 1 gets), None while the game goes on
prompt(state)       the question to the mover; it does not list the legal moves, or a model that
                    picks one of the list at random seems to know the game
say(state, move)    the completion that makes this move
read(completion)    the move that a completion makes, legal here or not; None where it makes none

and, if it likes,

FORFEIT             what an illegal move costs its player; default: 1
perfect(state)      {move: probability} of a player that nobody beats; nothing rewards it, it is
                    what a run is measured by
starts()            all first states, equally likely, where they are few enough to go through:
                    exploitability and winnings are then exact
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

from rldatasets import Problem, Problems
from tasks.guarded import guarded
from utils import UserError, as_number

LONGEST = 1000  # moves of a game
GAMES = 1024  # of random play, whose positions are the cold start's and the evaluation's


@dataclass(frozen=True)
class Game:
    """What a game's file defines, see above."""

    start: Callable
    mover: Callable
    moves: Callable
    play: Callable
    payoff: Callable
    prompt: Callable
    say: Callable
    read: Callable
    FORFEIT: float = 1.0
    perfect: Callable | None = None
    starts: Callable | None = None


NAMES = tuple(field.name for field in fields(Game))


def is_game_file(name):
    """Whether --dataset_name names a FILE.py that defines a game; it is not carried out."""
    path = Path(name)
    if path.suffix != ".py" or not path.is_file():
        return False
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:  # which load_task tells in a line
        return False
    return re.search(r"^(def\s+payoff\b|payoff\s*=)", text, re.MULTILINE) is not None


def game_of(found, path):
    """The Game of a file that defines these names; None where it defines no `payoff`. Raises
    UserError where something is missing."""
    if "payoff" not in found:
        return None
    for name in NAMES[:8]:
        if name not in found:
            raise UserError(f"{path}: a game needs {name} too; see tasks/games.py")
    given = {name: found[name] for name in NAMES if name in found}
    for name in given.keys() - {"FORFEIT"}:
        if not callable(given[name]):
            raise UserError(f"{path}: {name} is no function; write it as def")
    if as_number(given.get("FORFEIT", 1)) is None:
        raise UserError(f"{path}: FORFEIT = {given['FORFEIT']!r:.40} is no number")
    given = {name: guarded(x, path) if callable(x) else x for name, x in given.items()}
    if "perfect" in given:
        given["perfect"] = partial(_of_all_moves, given["perfect"], given["moves"])
    return Game(**given)


def _of_all_moves(perfect, moves, state):
    """{move: probability} of perfect play, with the moves that it leaves out, 0. Raises UserError
    where it is none."""
    said, legal = perfect(state), moves(state)
    fits = isinstance(said, dict) and {*said} <= {*legal}
    if not fits or not abs(sum(said.values()) - 1) <= 1e-6:  # nan is no probability either
        raise UserError(f"perfect returned {said!r:.60} in {state!r:.40}, not the probabilities of "
                        "legal moves, which sum to 1")  # fmt: skip
    return {move: said.get(move, 0.0) for move in legal}


def as_task(game):
    """What the rest of a task is where it is this game; its file may define it otherwise."""
    return {
        "problems": partial(problems_of, game),
        "REWARD_FUNCTIONS": [],  # the outcome comes from playing on, see sampling/self_play.py
        "is_correct": partial(is_best, game),
        "worked_answer": said,
    }


def positions(game):
    """{what the mover is told: a state} of all positions of a game that names its first states; of
    any other, of those that random play comes by. Raises UserError where a game does not end, or
    its functions contradict each other."""
    found = {}
    for state in _whole_tree(game) if game.starts else _random_play(game):
        if (paid := game.payoff(state)) is None:
            prompt = game.prompt(state)
            if prompt not in found:
                found[prompt] = state
                _check(game, state)
        elif not isinstance(paid, tuple) or [*map(type, map(as_number, paid))] != [float] * 2:
            raise UserError(f"payoff returned {paid!r:.60}, neither None nor two numbers")
        elif -min(paid) > game.FORFEIT:
            raise UserError(f"FORFEIT = {game.FORFEIT:g}: a game may cost {-min(paid):g}, so that "
                            "an illegal move is the better one; raise it")  # fmt: skip
    return {prompt: found[prompt] for prompt in sorted(found)}


def _random_play(game):
    """The states of GAMES games of random moves."""
    rng = random.Random(0)
    for _ in range(GAMES):
        state, plies = _going_on(game, game.start(rng)), 0
        yield state
        while game.payoff(state) is None:
            if (plies := plies + 1) > LONGEST:
                raise UserError(f"a game of random moves goes on after {LONGEST}: see its payoff")
            state = game.play(state, rng.choice(game.moves(state)))
            yield state


def _whole_tree(game):
    """All states of a game that names its first ones, move by move."""
    layer = dict.fromkeys(_going_on(game, state) for state in game.starts())
    for _ in range(LONGEST):
        following = {}  # the same state a move later is another, or a circle would go unseen
        for state in layer:
            yield state
            if game.payoff(state) is None:
                following |= dict.fromkeys(game.play(state, move) for move in game.moves(state))
        if not (layer := following):
            return
    raise UserError(f"a game of legal moves goes on after {LONGEST}: see its payoff")


def _going_on(game, first):
    """A first state, in which there is something to decide. Raises UserError where there is not."""
    try:
        hash(first)
    except TypeError:
        raise UserError(f"the state {first!r:.60} can be no key of a dict; use tuples") from None
    if game.payoff(first) is not None:
        raise UserError(f"a game is over before its first move, in {first!r:.60}; see its payoff")
    return first


def _check(game, state):
    """Raise UserError where a move that is legal in a state cannot be made."""
    if not game.moves(state) or game.mover(state) not in (0, 1):
        raise UserError(f"the game has no legal move, or no mover 0 or 1, in {state!r:.60}")
    for move in game.moves(state):
        said = game.say(state, move)
        if not isinstance(said, str) or game.read(said) != move:
            raise UserError(f"say writes the move {move!r:.40} as {said!r:.40}, which read does "
                            "not read as that")  # fmt: skip


def problems_of(game, split, seed):
    """Of "train": every position with each of its legal moves, from which a cold start learns how
    moves are written, all alike, and no strategy. Of "test": the positions in which some moves are
    worse than others, with one that is best; all positions where the game does not say that."""
    problems = []
    for prompt, state in positions(game).items():
        moves = game.moves(state)
        if split == "test":
            best = best_moves(game, state) if game.perfect else moves
            moves = best[:1] if len(best) < len(moves) or not game.perfect else ()
        for move in moves:
            text = game.say(state, move)
            problems.append(Problem(prompt, text, text, {"state": state}))
    return Problems(problems, seed)


def best_moves(game, state):
    return tuple(move for move, share in game.perfect(state).items() if share > 0)


def is_best(game, completion, problem):
    """Whether a completion makes a move that a perfect player may make; a legal one where the game
    does not say what is perfect."""
    state, move = problem.extra["state"], game.read(completion)
    return move in (best_moves(game, state) if game.perfect else game.moves(state))


def said(problem):
    return problem.answer
