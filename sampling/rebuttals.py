"""Rebuttals: completions that answer each other, in lock-step.

A reply (see turns.py) is made of one completion, while that is written. To answer another one it
has to be there: so all completions write a turn, then each is told what its task makes of the
others', and all write the next one. The gth completion of a question hears the gth of the others.

    prompt | It is 13. <end> | Your opponent says ... | But 8 + 5 is 13. <end>
    mask     T T T T   T       F F F F                  T T T T T T      T

Ids that were sampled stay as they are, as in turns.py; what was written so far is read anew.

Q questions, G completions per question, C completion tokens.
"""

from dataclasses import replace
from functools import partial

import torch
from torch.nn.utils.rnn import pad_sequence

from grpo import completion_lengths
from rldatasets import Transcript
from sampling.rollouts import padding_and_stops
from sampling.turns import between_turns, in_time, told_after, transcript
from utils import mixed_seed, to_device


def with_rebuttals(setup, problems, rollouts, sample, seeds=()):
    """The Rollouts of these problems after --rebuttals further turns, each of those completions
    that have ended their turn, and hear something.

    sample(prompts, group_size=, max_new_tokens=, seeds=, pictures=) makes Rollouts. seeds: a number
    per problem; none for greedy completions.
    """
    for turn in range(setup.args.rebuttals):
        draws = [mixed_seed(seed, "rebuttal", turn) for seed in seeds]
        rollouts = _one_more_turn(setup, problems, rollouts, sample, draws)
    return rollouts


def _one_more_turn(setup, problems, rollouts, sample, seeds):
    tokenizer, most = setup.tokenizer, setup.args.max_completion_length
    finished = rollouts.finished.clone()  # (Q, G)
    prompts, begun, places = [], {}, list(_heard(setup, problems, rollouts))
    lengths, between = completion_lengths(rollouts.completion_mask).tolist(), None
    for q, g, heard in places:
        between = between or between_turns(tokenizer)
        ids = rollouts.completion_ids[q, g, : lengths[q][g]].tolist()
        told = told_after(ids, tokenizer, between, heard)
        if len(ids) + len(told) >= most:  # no room for a further turn
            finished[q, g] = False
            continue
        begun[q, g] = len(ids), told, heard
        prompts.append([*rollouts.prompt_ids[q].tolist(), *ids, *told])
    if not prompts:
        return replace(rollouts, finished=finished)
    room = most - min(length + len(told) for length, told, _ in begun.values())
    further = sample(
        prompts, group_size=1, max_new_tokens=room,
        seeds=[mixed_seed(seeds[q], g) for q, g in begun] if seeds else (),
        pictures=rollouts.pictures and [rollouts.pictures[q] for q, _ in begun],
    )  # fmt: skip
    return _joined(setup, replace(rollouts, finished=finished), begun, further)


def _heard(setup, problems, rollouts):
    """(q, g, what it is told) of every completion that has ended and that its task answers."""
    rebut = partial(in_time, setup.task.rebut, problems, setup.args.reward_timeout)
    turns = [[_turns(text) for text in texts] for texts in rollouts.texts]
    for q, ended in enumerate(rollouts.finished.tolist()):
        for g in range(len(ended)):
            others = {p.question: said[g] for p, said in zip(problems, turns)}
            if ended[g] and (heard := rebut(q, turns[q][g], others)) is not None:
                yield q, g, heard


def _turns(text):
    return text.turns if isinstance(text, Transcript) else (text,)


def _joined(setup, rollouts, begun, further):
    """Rollouts some of whose completions go on. begun: {(q, g): (its length so far, the ids that it
    is told, the same as text)}; further: Rollouts (N, 1) of what they write then."""
    most, tokenizer = setup.args.max_completion_length, setup.tokenizer
    questions, size = rollouts.finished.shape
    lines = {place: n for n, place in enumerate(begun)}
    lengths = completion_lengths(further.completion_mask).flatten().tolist()
    columns, finished = {"ids": [], "mask": [], "logprobs": []}, rollouts.finished.clone()
    texts = [[*row] for row in rollouts.texts]
    for q in range(questions):
        for g in range(size):
            parts = [(rollouts.completion_ids[q, g], rollouts.completion_mask[q, g],
                      rollouts.logprobs[q, g])]  # fmt: skip
            if (q, g) in begun:
                length, told, heard = begun[q, g]
                n, room = lines[q, g], most - length - len(told)
                end = min(lengths[n], room)
                own = further.completion_ids[n, 0, :end]
                told = to_device(torch.tensor(told, device="cpu"), own.device)
                none = torch.zeros_like(told)
                parts = [
                    tuple(x[:length] for x in parts[0]),
                    (told, none.bool(), none.float()),
                    (own, further.completion_mask[n, 0, :end], further.logprobs[n, 0, :end]),
                ]
                finished[q, g] = further.finished[n, 0] & (lengths[n] <= room)
                [text] = tokenizer.batch_decode([own.tolist()], skip_special_tokens=True)
                texts[q][g] = transcript([*_turns(texts[q][g]), heard, text])
            for column, pieces in zip(columns.values(), zip(*parts)):
                column.append(torch.cat(pieces))
    pad, _ = padding_and_stops(setup.policy, tokenizer)
    ids, mask, logprobs = (
        pad_sequence(rows, batch_first=True, padding_value=value).unflatten(0, (questions, size))
        for rows, value in zip(columns.values(), (pad, False, 0.0))
    )  # (Q, G, C)
    longest = int(completion_lengths(mask).max())
    return replace(
        rollouts, completion_ids=ids[..., :longest], completion_mask=mask[..., :longest],
        logprobs=logprobs[..., :longest], finished=finished, texts=texts,
    )  # fmt: skip
