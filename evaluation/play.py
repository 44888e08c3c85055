"""A game against the policy, in the terminal: `python main.py play MODEL --dataset_name kuhn`.

It is asked as in training and answers as it was sampled; what it wrote is printed as text.
"""

import random
from contextlib import suppress

from evaluation.chat import load
from sampling.self_play import Match, play, policy_player, seated, winnings
from tasks import load_task
from utils import mixed_seed, printable


def play_with_a_person(args):
    """Games until there is no more input, the person in both seats by turns."""
    task = load_task(args)
    game = task.game
    model = aloud(policy_player(load(args, task)))
    person = person_playing(game)
    print(f"{task.system_prompt}\nYou and the model move first by turns. Ctrl-D ends.")
    with suppress(ImportError):
        import readline  # noqa: F401  input() then has a line to edit
    total, count = 0, 0
    with suppress(EOFError):
        while True:
            rng = random.Random(mixed_seed(args.seed, "person", count))
            seat = count % 2
            print(f"\n--- game {count + 1}")
            match = Match(game.start(rng), seated(person, model, seat), rng)
            play(game, [match])
            won = winnings(game, match)[seat]
            total, count = total + won, count + 1
            print("\n".join(told(game, match, 1 - seat, won)))
            print(f"{count} game{'s' * (count > 1)}: {total:+g}")
    print()


def person_playing(game):
    """A player that is asked in the terminal, and again where what it says is no legal move. A part
    of what there is to say will do where it is of one move alone."""

    def player(matches):
        [match] = matches
        state = match.state
        print(f"\n{game.prompt(state)}")
        while True:
            typed = input("> ").strip().lower()
            known = [game.say(state, move) for move in game.moves(state)]
            meant = [said for said in known if typed and typed in said.lower()]
            if len(meant) == 1:
                return meant
            print(f"No move: say {', or '.join(known)}")

    return player


def aloud(player):
    """A player whose words are printed."""

    def speaks(matches):
        said = player(matches)
        for text in said:
            print(f"the model: {printable(text)}")
        return said

    return speaks


def told(game, match, seat, won):
    """Lines that say how a game ended, and what the model, in this seat, had been told in it."""
    if match.fault is not None:
        yield "That is no legal move: the model loses, and you get nothing for it."
    else:
        yield f"You win {won:g}." if won > 0 else f"You lose {-won:g}." if won else "A draw."
    for state, said in match.turns:
        if game.mover(state) == seat:
            yield f"  it knew: {game.prompt(state)} It said: {printable(said)}"
