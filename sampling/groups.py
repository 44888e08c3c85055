"""Prompts in, `Rollouts` out: each prompt computed once, its keys and values shared by the group.

Letters: Q questions, G completions per question, N live completions (at first Q·G), R rows of the
model (at most N, fewer where completions are equal so far), P prompt tokens, C completion tokens, V
vocabulary.
"""

from dataclasses import replace
from functools import partial

import torch

from llms import prompt_of
from sampling.cuda_graph import GraphDecoder, recorder_for
from sampling.decoder import Decoder
from sampling.drawing import NO_FILTERS, Filters, sample_tokens, uniform_draws
from sampling.engine import sample_rollouts_vllm
from sampling.fallback import OwnLayers, falls_back
from sampling.paged import sample_rollouts_paged
from sampling.rebuttals import with_rebuttals
from sampling.rollouts import as_rollouts, joined_rollouts, padding_and_stops, string_ends
from sampling.turns import Turns, replies
from training.progress import progress
from training.sharding import whole
from training.tree import first_of_each
from utils import release_freed_memory, to_device
from vision.sight import pictures_of

# Tokens between two looks at which rows have finished, by device type; elsewhere 1. A look makes
# the host wait for the device. Rows that go on meanwhile are masked: the result is the same.
LOOK_EVERY = {"cuda": 16}
# Where completions that are equal so far share a row of the model. It takes a look at every token,
# and rows that come and go. On a CPU both cost next to nothing and rows cost time; on a GPU it is
# the other way round, and a recorded step needs as many rows as the one before.
SHARING = {"cpu"}


def sample_groups(setup, problems, seeds, group_size=None):
    """G completions (by default --group_size) for each of these problems, from the policy as it is
    now; `seeds`, a number per problem, fix the draws."""
    args, tokenizer = setup.args, setup.tokenizer
    group_size = group_size or args.group_size
    prompts = [prompt_of(tokenizer, setup.task, problem) for problem in problems]
    if args.sampler == "vllm":
        return sample_rollouts_vllm(setup, prompts, group_size, seeds)
    at_once = args.sampling_batch_size // group_size or len(prompts)  # questions
    at_once = max(1, at_once // setup.task.together) * setup.task.together
    parts = []
    with setup.accelerator.autocast(), whole(setup.policy):
        pictures = pictures_of(setup.policy, tokenizer, prompts, problems)
        for start in range(0, len(prompts), at_once):
            now = slice(start, start + at_once)
            part = sample(
                setup, prompts[now], group_size, args.max_completion_length, seeds[now],
                replies(setup, problems[now]), pictures and pictures[now],
            )  # fmt: skip
            again = partial(sample, setup)
            parts.append(with_rebuttals(setup, problems[now], part, again, seeds[now]))
    release_freed_memory(setup.accelerator.device)
    return joined_rollouts(parts)


def sample(setup, prompts, group_size, max_new_tokens, seeds, reply=None, pictures=None):
    """`sample_rollouts` by the engine, and with the filters, that the flags name."""
    args = setup.args
    common = (
        setup.policy, setup.tokenizer, prompts, group_size, max_new_tokens, args.temperature, seeds
    )  # fmt: skip
    if args.sampler == "paged":
        return sample_rollouts_paged(*common)
    filters, fused = filters_of(args), args.sampler == "fused"
    return sample_rollouts(*common, filters, fused, args.stop, reply=reply, pictures=pictures)


def filters_of(args):
    """The Filters that the flags name."""
    return Filters(args.top_k, args.top_p, args.min_p)


@torch.no_grad()
def sample_rollouts(
    model,
    tokenizer,
    prompts,
    group_size,
    max_new_tokens,
    temperature,
    seeds=(),
    filters=NO_FILTERS,
    fused=False,
    stop=(),
    watch=None,
    pictures=None,
    reply=None,
):
    """Sample `group_size` completions for every prompt, all of them in one batch.

    prompts: Q lists of token ids. Nothing is read from the model's generation config but its stop
    tokens: its sampling defaults (Qwen ships top_k 20, top_p 0.8) would make the completions come
    from another distribution than the one that is trained.

    seeds: a number per prompt, which fixes every draw for that prompt's group. So a completion does
    not depend on which prompts share its batch, nor on when its neighbours finish. Temperature 0 is
    greedy and needs none. `fused`: what is recorded on a GPU in fewer kernels (see fused.py), the
    same tokens, up to rounding. A completion also ends with the token that completes one of the
    strings `stop`. `watch(tokens)` is called after every token, with those of the rows that had not
    finished. `pictures`: what each of the prompts shows, a Picture or None; None where none shows
    anything.

    `reply(q, turns)` is what the world answers a completion of prompt q whose turn has ended, None
    where that is the end; turns: its texts so far, see turns.py. What it says counts as tokens of
    the completion, and a completion that it leaves no room for another turn is cut off.
    """
    device = model.get_input_embeddings().weight.device
    pad_id, stop_ids = padding_and_stops(model, tokenizer)
    stops = to_device(torch.tensor(stop_ids, device="cpu"), device)
    rows = len(prompts) * group_size
    ids = torch.full((rows, max_new_tokens), pad_id, device=device)
    mask = torch.zeros((rows, max_new_tokens), dtype=torch.bool, device=device)
    logprobs = torch.zeros((rows, max_new_tokens), device=device)
    finished = torch.zeros(rows, dtype=torch.bool, device=device)
    if temperature > 0:
        uniforms = uniform_draws(seeds, len(prompts), group_size, max_new_tokens, device)
    else:
        uniforms = torch.zeros((max_new_tokens, rows), dtype=torch.float64, device=device)
    turns = Turns(tokenizer, reply, ids, group_size) if reply else None

    decoder = decoder_of(model, group_size, max_new_tokens, fused)
    logits, row = decoder.prefill(prompts, pictures)  # (R, V), (N,) on the host
    row_there = to_device(torch.from_numpy(row), device)
    live = torch.arange(rows, device=device)  # the line of `ids` that each live completion writes
    look_often = watch or turns or decoder.shares
    look_every = 1 if look_often else LOOK_EVERY.get(device.type, 1)

    for t in range(max_new_tokens):
        tokens, scores = sample_tokens(logits, uniforms[t, live], temperature, filters, row_there)
        writing = drawing = ~finished[live]
        if turns:
            told = turns.told[live, t]
            tokens, drawing = torch.where(told, ids[live, t], tokens), writing & ~told
        ids[live, t] = torch.where(writing, tokens, pad_id)
        mask[live, t] = drawing
        logprobs[live, t] = torch.where(drawing, scores.float(), 0.0)
        finished[live] |= (tokens[:, None] == stops).any(-1) & drawing
        if watch:
            watch(ids[live[writing], t])
        last, looking = t + 1 == max_new_tokens, (t + 1) % look_every == 0
        if stop and (last or looking):
            since = t - t % look_every
            ends = string_ends(tokenizer, stop, ids[:, : t + 1], mask[:, : t + 1], since)
            for line, end in ends.items():
                ids[line, end:], mask[line, end:], logprobs[line, end:] = pad_id, False, 0.0
                finished[line] = True
        if turns:
            finished[turns.go_on(live[finished[live]].tolist(), t + 1)] = False
        if last:
            break
        if looking:
            progress.tick(len(live) * look_every, "tokens")
            alive = (~finished[live]).cpu()  # the look
            if not alive.any():
                break
            left = alive.nonzero().squeeze(-1)
            there = to_device(left, device)
            live, tokens, row = live[there], tokens[there], row[left.numpy()]
            if decoder.shares:
                parents, own = parted(row, tokens.numpy())
                row = decoder.branch(parents)[own]
            elif len(left) < len(alive):
                row = decoder.branch(row)
            row_there = to_device(torch.from_numpy(row), device)
        of_rows = torch.zeros_like(decoder.position).index_copy(0, row_there, tokens)  # (R,)
        logits = decoder.step(of_rows)

    if turns:
        finished[turns.cut_off] = False
    rollouts = as_rollouts(tokenizer, prompts, group_size, ids, mask, logprobs, finished, turns)
    return replace(rollouts, pictures=pictures)


def decoder_of(model, group_size, max_new_tokens, fused):
    """What computes the tokens: the model's own layers where ours were not proven equal, else ours,
    recorded as a graph where the device can."""
    device = model.get_input_embeddings().weight.device.type
    if falls_back(model):
        return OwnLayers(model, group_size, max_new_tokens, device in SHARING)
    if recorder := recorder_for(model, device):
        kind = fused_decoder() if fused else GraphDecoder
        return kind(model, group_size, max_new_tokens, recorder)
    return Decoder(model, group_size, max_new_tokens, device in SHARING)


def fused_decoder():
    """fused.FusedDecoder, imported where it is asked for: torch for CPUs comes without triton."""
    from sampling.fused import FusedDecoder

    return FusedDecoder


def parted(row, tokens):
    """Rows that completions go on in, where those of one row have drawn these tokens: what each of
    the R' new rows continues (R',), and which of them is each completion's (N,). On the host."""
    first, own = first_of_each(row * (tokens.max() + 1) + tokens)
    return row[first], own
