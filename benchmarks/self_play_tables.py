"""Self-play by players that are tables, one setting changed at a time: seconds, no model.

A table holds a softmax over the moves of each position, and learns with the functions that a model
learns with (sampling/self_play.py, grpo.group_advantages): what of a result is the game's and the
objective's, and not the model's.

    python benchmarks/self_play_tables.py

A line per setting: exploitability of the last policy (lowest, highest, mean over seeds) and of the
mean policy. `locked`: from "always bet, always fold" in 98 % of the cases, not from even play.
"""

import argparse
import math
import random
import sys
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluation.games import exploitability
from grpo import group_advantages
from sampling.self_play import Match, drawing_player, outcomes, reached, trembling
from tasks import load_task
from tasks.games import positions
from utils import mixed_seed

GROUP = 8  # moves at a position


class Table:
    """A softmax over the moves of each position, and one GRPO step on moves that were drawn."""

    def __init__(self, game):
        self.game = game
        self.logits = {
            prompt: dict.fromkeys(game.moves(state), 0.0)
            for prompt, state in positions(game).items()
        }

    def policy(self, state):
        return self.at(self.game.prompt(state))

    def at(self, prompt):
        weights = {move: math.exp(logit) for move, logit in self.logits[prompt].items()}
        total = sum(weights.values())
        return {move: weight / total for move, weight in weights.items()}

    def step(self, seed, rate, scale, tremble=0.0, entropy_bonus=0.0, questions=8):
        """What main.draw_groups and an update do, with this for a model. Returns (Q, G) advantages
        and the states that they belong to."""
        game = self.game
        player = drawing_player(game, self.policy)
        learner = trembling(game, player, tremble)
        seeds = [mixed_seed(seed, q) for q in range(questions)]
        states = reached(game, learner, [learner], seeds)
        groups = []
        for state, at in zip(states, seeds):
            rng = random.Random(mixed_seed(at, "moves"))
            groups.append((state, at, player([Match(state, (), rng)] * GROUP)))
        advantages = group_advantages(outcomes(game, learner, [learner], groups), scale)  # (Q, G)
        slopes = {}
        for (state, _, texts), row in zip(groups, advantages.tolist()):
            slope = slopes.setdefault(game.prompt(state), dict.fromkeys(game.moves(state), 0.0))
            for text, advantage in zip(texts, row):
                for move, share in self.policy(state).items():
                    slope[move] += advantage * ((move == game.read(text)) - share) / GROUP
        for prompt, slope in slopes.items():
            shares = self.at(prompt)
            entropy = -sum(share * math.log(share) for share in shares.values())
            for move, value in slope.items():
                bonus = -entropy_bonus * shares[move] * (math.log(shares[move]) + entropy)
                self.logits[prompt][move] += rate * (value + bonus)
        return states, advantages


def game_named(name):
    flags = {"dataset_path": None, "evaluator": None, "seed": 0}
    return load_task(SimpleNamespace(dataset_name=name, **flags)).game


def trained(game, seed, steps, locked=False, **settings):
    """(the table after so many steps, the mean of its policies)."""
    table, mean = Table(game), {}
    for moves in table.logits.values():
        moves.update({move: 4.0 for move in moves if locked and move in ("bet", "fold")})
    for step in range(steps):
        table.step(mixed_seed(seed, step), rate=1.0, **settings)
        for prompt in table.logits:
            for move, share in table.at(prompt).items():
                mean[prompt, move] = mean.get((prompt, move), 0) + share / steps

    def policy(state):
        return {move: mean[game.prompt(state), move] for move in game.moves(state)}

    return table, policy


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=160)
    args = parser.parse_args(argv)
    game = game_named("kuhn")
    for locked in (False, True):
        for scale in ("none", "std"):
            for tremble, bonus in ((0, 0), (0.2, 0), (0, 0.1), (0.2, 0.1)):
                settings = {"scale": scale, "tremble": tremble, "entropy_bonus": bonus}
                runs = [trained(game, seed, args.steps, locked, **settings)
                        for seed in range(args.seeds)]  # fmt: skip
                last = [exploitability(game, table.policy) for table, _ in runs]
                mean = fmean(exploitability(game, policy) for _, policy in runs)
                print(f"{'locked' if locked else 'even':6} scale {scale:4} tremble {tremble:<3} "
                      f"bonus {bonus:<3} last {min(last):.2f}-{max(last):.2f} "
                      f"{fmean(last):.3f} mean policy {mean:.3f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
