"""Nim with up to 21 stones: take one, two or three; whoever takes the last one wins.

There are 11 to 21 stones at first. One position of it:

    question  14 stones are left.
    answers   I take 1.    I take 2.    I take 3.

Whoever leaves a multiple of four wins: from there each move of the other side can be filled up to
four (C. L. Bouton, Nim, a game with a complete mathematical theory, 1901, for the general case).
"""

import re

SYSTEM_PROMPT = "Two players take 1, 2 or 3 stones in turn. Whoever takes the last stone wins."
MOST = 3  # stones in a move
FIRST = range(11, 22)  # stones at the start
MOVE = re.compile(r"I take ([0-9])\.")

# A state is (stones left, who moves).


def starts():
    return [(stones, 0) for stones in FIRST]


def start(rng):
    return rng.choice(FIRST), 0


def mover(state):
    return state[1]


def moves(state):
    return tuple(range(1, min(MOST, state[0]) + 1))


def play(state, move):
    return state[0] - move, 1 - state[1]


def payoff(state):
    """1 to whoever took the last stone, who does not move now."""
    if state[0]:
        return None
    return (-1, 1) if state[1] == 0 else (1, -1)


def prompt(state):
    return f"{state[0]} stones are left."


def say(state, move):
    return f"I take {move}."


def read(completion):
    match = MOVE.fullmatch(completion.strip())
    return int(match[1]) if match else None


def perfect(state):
    """The move that leaves a multiple of four; where there is none, all are lost alike."""
    good = state[0] % (MOST + 1)
    legal = moves(state)
    return {move: float(move == good) if good else 1 / len(legal) for move in legal}
