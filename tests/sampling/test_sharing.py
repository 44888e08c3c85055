"""Completions that are equal so far share a row: fewer rows, the same samples."""

import random

import numpy as np
import pytest
import torch
from conftest import make_model
from toys import Words, seeds

from sampling import groups
from sampling.decoder import Decoder, arranged
from sampling.drawing import Filters
from sampling.groups import parted, sample_rollouts

PROMPTS = [[5, 2, 8], [3], [7, 7]]
SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.3},  # many copies
    {"temperature": 1.5, "filters": Filters(top_k=3)},
    {"temperature": 0.7, "filters": Filters(top_p=0.8, min_p=0.05)},
    {"temperature": 0},
]


def sampled(shares, monkeypatch, model, seed=0, length=24, group_size=6, **settings):
    monkeypatch.setattr(groups, "SHARING", {"cpu"} if shares else set())
    return sample_rollouts(
        model, Words(0), PROMPTS, group_size, length, seeds=seeds(seed), **settings
    )


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_samples_and_their_log_probs_are_the_same(settings, family, monkeypatch):
    model = make_model(family, dtype=torch.float64, vocab_size=14)
    for seed in range(4):
        shared, alone = (sampled(on, monkeypatch, model, seed, **settings) for on in (True, False))
        assert torch.equal(shared.completion_ids, alone.completion_ids)
        assert torch.equal(shared.completion_mask, alone.completion_mask)
        assert torch.equal(shared.finished, alone.finished)
        assert (shared.logprobs - alone.logprobs).abs().max() < 1e-5
        assert shared.texts == alone.texts


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_a_step_has_a_row_for_every_distinct_prefix_that_goes_on(temperature, monkeypatch):
    rows, step = [], Decoder.step
    monkeypatch.setattr(
        Decoder, "step", lambda self, tokens: rows.append(len(tokens)) or step(self, tokens)
    )
    model = make_model(dtype=torch.float64, vocab_size=14)
    rollouts = sampled(True, monkeypatch, model, temperature=temperature)
    expected = []
    for t in range(rollouts.completion_ids.shape[-1]):
        going_on = rollouts.completion_mask.sum(-1) > t + 1
        going_on |= ~rollouts.finished & (rollouts.completion_mask.sum(-1) > t)
        expected.append(len({
            (q, *rollouts.completion_ids[q, g, : t + 1].tolist())
            for q, g in going_on.nonzero().tolist()
        }))  # fmt: skip
    assert rows == [count for count in expected[: len(rows)]]
    assert rows[0] <= 18 and min(rows) < 18


def test_questions_that_ask_the_same_share_rows_and_keep_their_draws(monkeypatch):
    model = make_model(dtype=torch.float64, vocab_size=14)
    rows, prefill = [], Decoder.prefill
    watched = lambda *inputs: rows.append(prefill(*inputs)) or rows[-1]  # noqa: E731
    monkeypatch.setattr(Decoder, "prefill", watched)
    prompts, numbers = [[5, 2, 8], [3], [5, 2, 8], [7, 7], [3]], range(5)
    together = sample_rollouts(model, Words(0), prompts, 3, 12, 1.0, numbers)
    assert len(rows[0][0]) == 3
    assert rows[0][1].tolist() == [0] * 3 + [1] * 3 + [0] * 3 + [2] * 3 + [1] * 3
    for prompt, number, texts in zip(prompts, numbers, together.texts):
        alone = sample_rollouts(model, Words(0), [prompt], 3, 12, 1.0, [number])
        assert alone.texts == [texts]


def test_a_greedy_group_is_one_row(monkeypatch):
    rows, step = [], Decoder.step
    monkeypatch.setattr(
        Decoder, "step", lambda self, tokens: rows.append(len(tokens)) or step(self, tokens)
    )
    model = make_model(vocab_size=14)
    sampled(True, monkeypatch, model, temperature=0, group_size=8)
    assert max(rows) == 3  # questions


@pytest.mark.parametrize("seed", range(30))
def test_rows_are_moved_without_writing_over_what_is_still_read(seed):
    """Against plain lists: the row at places[i] has to be a copy of that of parents[i]."""
    rng = random.Random(seed)
    before = list(range(rng.randrange(1, 9)))
    parents = np.array([rng.choice(before) for _ in range(rng.randrange(1, 12))])
    places, to, of = arranged(parents)
    assert sorted(places) == list(range(len(parents)))
    room = [f"row {n}" for n in before] + [None] * 12
    for target, source in zip(to, of):  # one after the other, as if in place
        assert source not in to
        room[target] = f"row {source}"
    assert [room[place] for place in places] == [f"row {parent}" for parent in parents]
    stay = {parent for parent in parents if parent < len(parents)}
    assert len(to) == len(parents) - len(stay)  # nothing moves that can stay


def test_completions_part_where_their_draws_do():
    row, tokens = np.array([0, 0, 1, 1, 0]), np.array([4, 5, 4, 4, 4])
    parents, own = parted(row, tokens)
    assert parents.tolist() == [0, 0, 1]
    assert own.tolist() == [0, 1, 2, 2, 0]
