"""Kuhn poker: three cards, one bet. The smallest game in which one has to bluff.

Each of two players puts one chip in and is dealt one of Jack, Queen and King. The first checks or
bets a chip; after a check the second may bet. Whoever faces a bet folds, or calls with a chip. The
higher card wins what is in the middle (H. W. Kuhn, A simplified two-person poker, 1950). One
position of it:

    question  You hold the Queen. Your opponent bets.
    answers   My Queen folds.    My Queen calls.

A move names its card, so that the card stands right before the decision: whether a small model's
moves come to depend on it is what takes time.

In balance the first player loses 1/18 chip a hand. There are many ways to play perfectly: the first
bets a Jack with a probability A of at most 1/3, a King with 3 A, and after a check and a bet calls
with a Queen in A + 1/3 of the cases; everything else is fixed.
"""

import re

SYSTEM_PROMPT = "Poker with Jack, Queen and King: the higher card wins."
FORFEIT = 2.0  # as much as can be lost by a legal move
CARDS = ("Jack", "Queen", "King")
FACING = {
    (): "You act first.",
    ("check",): "Your opponent checks.",
    ("bet",): "Your opponent bets.",
    ("check", "bet"): "You checked, your opponent bets.",
}
MOVE = re.compile(rf"My (?:{'|'.join(CARDS)}) (check|bet|fold|call)s\.")
A = 1 / 6  # in the middle of the perfect ways to play: every move of any of them has a probability

# A state is (both cards, the moves so far).


def starts():
    return [((a, b), ()) for a in CARDS for b in CARDS if a != b]


def start(rng):
    return rng.choice(starts())


def mover(state):
    return len(state[1]) % 2


def moves(state):
    return ("fold", "call") if state[1][-1:] == ("bet",) else ("check", "bet")


def play(state, move):
    cards, made = state
    return cards, (*made, move)


def payoff(state):
    """Chips won; what is folded goes to the other, else the higher card has it."""
    (first, second), made = state
    if made[-1:] == ("fold",):
        won = 1 if len(made) == 2 else -1  # by the first player: who moves second has folded
    elif made[-1:] == ("call",) or made == ("check", "check"):
        won = 2 if made[-1] == "call" else 1
        won = won if CARDS.index(first) > CARDS.index(second) else -won
    else:
        return None
    return won, -won


def prompt(state):
    return f"You hold the {state[0][mover(state)]}. {FACING[state[1]]}"


def say(state, move):
    return f"My {state[0][mover(state)]} {move}s."


def read(completion):
    match = MOVE.fullmatch(completion.strip())
    return match[1] if match else None


# The probability of the bolder move, to bet or to call, with Jack, Queen and King.
PERFECT = {
    (): (A, 0, 3 * A),
    ("check",): (1 / 3, 0, 1),
    ("bet",): (0, 1 / 3, 1),
    ("check", "bet"): (0, A + 1 / 3, 1),
}


def perfect(state):
    bold = PERFECT[state[1]][CARDS.index(state[0][mover(state)])]
    timid, bolder = moves(state)
    return {timid: 1 - bold, bolder: bold}
