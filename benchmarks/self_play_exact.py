"""Kuhn poker by self-play with exact probabilities, one setting changed at a time.

What --preset cpu --dataset_name kuhn does, less the sampled text: moves are drawn from the
probabilities of the legal answers, among which these sum to 1, and so are the games played on. A
step then reads all positions with all moves once, as one tree, and takes a fifth of a run's time.

    python benchmarks/self_play_exact.py --seed 1 --only preset kl_0

A line per setting and evaluation. What is left out: moves that are not legal, and sampling's noise
in what is no move.
"""

import argparse
import copy
import random
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluation.games import both_seats, exploitability
from evaluation.referee_local import common
from grpo import Batch, group_advantages, grpo_loss
from launch.loading import load
from launch.parser import parse_args
from llms import chat_prompt
from rldatasets import Problem
from sampling.self_play import (
    Match,
    drawing_player,
    outcomes,
    random_moves,
    reached,
    trembling,
)
from sampling.turns import worked_ids
from tasks import load_task
from tasks.games import positions
from training.cold_start import rate_at
from training.logprobs import completion_logprobs
from training.optimizer import apply_gradients, make_optimizer
from training.processes import make_accelerator
from training.setup import Setup
from training.shared_prefix import micro_batches
from training.update import objective_of
from utils import mixed_seed

SHORT = "I {move}."  # a move that does not name its card
# {name: (flags that differ from the preset's, how a move is written where it is otherwise)}
SETTINGS = {
    "preset": ({}, None),
    "kl_0": ({"kl_beta": 0.0}, None),
    "bonus": ({"kl_beta": 0.0, "entropy_bonus": 0.2}, None),
    "kl_0.1": ({"kl_beta": 0.1}, None),
    "tremble_0": ({"tremble": 0.0}, None),
    "std": ({"advantage_scale": "std"}, None),
    "questions_16": ({"questions_per_step": 16}, None),
    "rate_5e-6": ({"learning_rate": 5e-6}, None),
    "card_unnamed": ({}, SHORT),
    "constant_cold_start": ({"cold_start_schedule": "constant"}, None),
}


class Moves:
    """All positions' legal moves, N in all, as one tree below what all prompts begin with."""

    def __init__(self, setup):
        game = setup.task.game
        self.positions = positions(game)
        problems = [
            Problem(prompt, game.say(state, move), "", {"move": move})
            for prompt, state in self.positions.items()
            for move in game.moves(state)
        ]
        self.names = [problem.extra["move"] for problem in problems]
        system, tokenizer = setup.task.system_prompt, setup.tokenizer
        prompts = [chat_prompt(tokenizer, system, problem.question) for problem in problems]
        worked = [ids for ids, _ in worked_ids(tokenizer, problems, setup.task)]
        shared = common(prompts)
        rows = [torch.tensor(p[shared:] + w) for p, w in zip(prompts, worked)]
        self.ids = pad_sequence(rows, batch_first=True)  # (N, C)
        places = torch.arange(self.ids.shape[1])
        ends = torch.tensor([[len(row)] for row in rows])
        begins = ends - torch.tensor([[len(ids)] for ids in worked])
        self.own = (places >= begins) & (places < ends)  # (N, C), the moves' tokens
        lengths = [[len(row) for row in rows]]
        [self.batch] = micro_batches([torch.tensor(prompts[0][:shared])], lengths, 0, self.ids)

    def logprobs(self, policy, with_entropy=False):
        """(log-probs, entropies or None), both (N, C)."""
        rows = self.batch.rows
        found = completion_logprobs(policy, self.batch, self.ids[rows], 1.0, with_entropy)
        return [x if x is None else torch.zeros_like(x).index_copy(0, rows, x) for x in found]

    def shares(self, logprobs):
        """{what the mover is told: {move: probability}}."""
        totals = (logprobs.detach() * self.own).double().sum(-1)
        parts = totals.view(-1, 2).softmax(-1).tolist()  # there are two moves everywhere
        names = zip(self.names[::2], self.names[1::2])
        return {p: dict(zip(two, part)) for p, two, part in zip(self.positions, names, parts)}


def cold_start(setup, moves):
    args = setup.args
    optimizer = torch.optim.AdamW(
        setup.policy.parameters(), lr=args.cold_start_learning_rate, weight_decay=0.0, fused=True
    )
    for step in range(args.cold_start_steps):
        optimizer.param_groups[0]["lr"] = rate_at(args, args.cold_start_steps - step)
        logprobs, _ = moves.logprobs(setup.policy)
        loss = -(logprobs * moves.own).sum() / moves.own.sum()
        loss.backward()
        apply_gradients(optimizer, loss.detach(), args.max_grad_norm)


def drawn(setup, shares, seed):
    """{(what the mover is told, move): (how often it was drawn, sum of advantages)} of a step."""
    args, game = setup.args, setup.task.game
    player = drawing_player(game, lambda state: shares[game.prompt(state)])
    learner = trembling(game, player, args.tremble)
    seeds = [mixed_seed(seed, q) for q in range(args.questions_per_step)]
    groups = []
    for state, at in zip(reached(game, learner, [learner], seeds), seeds):
        rng = random.Random(mixed_seed(at, "moves"))
        groups.append((state, at, player([Match(state, (), rng)] * args.group_size)))
    earned = outcomes(game, learner, [learner], groups)
    advantages = group_advantages(earned, args.advantage_scale).tolist()  # Q x G
    found = {}
    for (state, _, texts), row in zip(groups, advantages):
        for text, advantage in zip(texts, row):
            key = game.prompt(state), game.read(text)
            count, total = found.get(key, (0, 0.0))
            found[key] = count + 1, total + advantage
    return found


def trained(setup, moves, name):
    """GRPO from the policy as it is; prints a line per evaluation."""
    args, objective, reference = setup.args, objective_of(setup.args), None
    optimizer, scheduler = make_optimizer(setup.policy, args)
    keys = [*zip((p for p in moves.positions for _ in range(2)), moves.names)]
    for step in range(args.num_train_iters + 1):
        logprobs, entropy = moves.logprobs(setup.policy, args.entropy_bonus > 0)  # (N, C)
        shares = moves.shares(logprobs)
        if step % args.eval_iterations == 0:
            print(line(setup, shares, f"{name:20} step {step:2}"), flush=True)
        if step == args.num_train_iters:
            return
        reference = logprobs.detach() if reference is None else reference
        found = drawn(setup, shares, mixed_seed(args.seed, step))
        counts, sums = torch.tensor([found.get(key, (0, 0.0)) for key in keys]).T  # (N,) each
        each = counts / (args.questions_per_step * args.group_size)
        batch = Batch(
            sampled_logprobs=logprobs.detach(),
            advantages=sums / counts.clamp(min=1),
            weights=each[:, None] * moves.own / moves.own.sum(-1, keepdim=True),
            ref_logprobs=reference if args.kl_beta else None,
        )
        loss, _ = grpo_loss(logprobs, batch, objective, entropy)
        loss.backward()
        apply_gradients(optimizer, loss.detach(), args.max_grad_norm)
        scheduler.step()


def line(setup, shares, name):
    game = setup.task.game

    def policy(state):
        return shares[game.prompt(state)]

    bold = " ".join(f"{list(of.values())[1]:.2f}" for of in shares.values())
    chips = both_seats(game, policy, random_moves(game))
    return (f"{name} exploitability {exploitability(game, policy):.3f} chips against random "
            f"{chips:+.3f} bold moves {bold}")  # fmt: skip


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model_name", default="smollm2-135m")
    parser.add_argument("--steps", type=int, help="default: the preset's")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=[*SETTINGS])
    asked = parser.parse_args(argv)
    args = parse_args(["--preset", "cpu", "--dataset_name", "kuhn", "--seed", str(asked.seed),
                       "--model_name", asked.model_name, "--output_dir", "unused"])  # fmt: skip
    args.num_train_iters, args.eval_iterations = asked.steps or args.num_train_iters, 5
    accelerator, task = make_accelerator(), load_task(args)
    policy, tokenizer, _ = load(args, accelerator, task)
    raw, starts = copy.deepcopy(policy.state_dict()), {}
    for name in asked.only:
        flags, wording = SETTINGS[name]
        game = task.game
        if wording:
            game = replace(game, say=lambda _, move, text=wording: text.format(move=move),
                           read=lambda text: text.removeprefix("I ").removesuffix("."))  # fmt: skip
        its = argparse.Namespace(**{**vars(args), **flags})
        setup = Setup(policy, tokenizer, replace(task, game=game), its, accelerator)
        moves, key = Moves(setup), (wording, its.cold_start_schedule)
        if key not in starts:
            policy.load_state_dict(raw)
            cold_start(setup, moves)
            starts = {key: copy.deepcopy(policy.state_dict())}  # one at a time, half a GB each
        policy.load_state_dict(starts[key])
        trained(setup, moves, name)


if __name__ == "__main__":
    main()
