"""A group as a tree: what is equal is read once, and nobody can tell from the result."""

import random

import numpy as np
import pytest
import torch
from conftest import FAMILIES, make_model
from toys import naive_logprobs

from training.logprobs import completion_logprobs
from training.shared_prefix import micro_batches, own_tokens
from training.tree import alone, first_of_each, prefix_numbers

# Two begin alike, as all do that have a system message.
PROMPTS = [torch.tensor(ids) for ids in ([5, 17, 2, 88], [9, 9], [5, 17, 3])]
# Per question: copies, a completion that is the beginning of another, late and early partings.
GROUPS = [
    [[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3], [1, 2, 9, 4]],
    [[7], [7], [7, 7], [8]],
    [[1, 2, 3, 4, 5, 6], [6, 5, 4], [6, 5, 4], [1, 2, 3, 4, 5, 7]],
]
LENGTHS = [[len(row) for row in group] for group in GROUPS]
WIDTH = 6
# What stands behind a completion's end differs, and must not matter.
IDS = torch.tensor([[row + [50 + q, 60 + g, 70, 71, 72][: WIDTH - len(row)] for g, row in
                     enumerate(group)] for q, group in enumerate(GROUPS)])  # (Q, G, C)  # fmt: skip
MASK = torch.arange(WIDTH) < torch.tensor(LENGTHS)[..., None]


def naive(model, temperature=0.7):
    rows = [naive_logprobs(model, p, ids, temperature) for p, ids in zip(PROMPTS, IDS)]
    return torch.stack(rows).where(MASK, 0)  # (Q, G, C)


def entropies(model, temperature=0.7):
    """Of the distribution that each token was drawn from, (Q, G, C)."""
    result = torch.zeros(MASK.shape, dtype=torch.float64)
    for q, g, c in MASK.nonzero().tolist():
        ids = torch.cat([PROMPTS[q], IDS[q, g, :c]])[None]
        logits = model(ids).logits[0, -1] / temperature
        result[q, g, c] = torch.distributions.Categorical(logits=logits).entropy()
    return result


def packed(model, budget=0, shared=True, entropy=False):
    ids = IDS.flatten(0, 1)
    result = torch.zeros(ids.shape, dtype=torch.float64)
    for batch in micro_batches(PROMPTS, LENGTHS, budget, ids if shared else None):
        both = completion_logprobs(model, batch, ids[batch.rows], 0.7, entropy)
        result = result.index_copy(0, batch.rows, both[int(entropy)].double())
    return result.view(MASK.shape)


def value_and_gradients(model, function):
    weights = torch.randn(MASK.shape, generator=torch.Generator().manual_seed(1)).double()
    model.zero_grad()
    values = function(model)
    (values * weights).sum().backward()
    return values.detach(), [p.grad.clone() for p in model.parameters()]


def assert_same(ours, theirs, value=1e-12, gradient=1e-5):
    assert (ours[0] - theirs[0]).abs().max() <= value
    assert all((a - b).norm() <= gradient * b.norm() for a, b in zip(ours[1], theirs[1]))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [0, 1, 9, 12, 16])
def test_values_and_gradients_are_those_of_every_sequence_by_itself(family, budget):
    model = make_model(family, torch.float64)
    expected = value_and_gradients(model, naive)
    assert_same(value_and_gradients(model, lambda m: packed(m, budget)), expected)
    unshared = value_and_gradients(model, lambda m: packed(m, budget, shared=False))
    assert_same(value_and_gradients(model, lambda m: packed(m, budget)), unshared)


@pytest.mark.parametrize("budget", [0, 1, 20])
def test_questions_that_ask_the_same_are_read_once(budget):
    """Two of four prompts are equal, and so is a part of what was written to them."""
    model = make_model(dtype=torch.float64)
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0].clone(), PROMPTS[2]]
    ids = torch.cat([IDS[:2], IDS[:1], IDS[2:]])  # (4, G, C)
    ids[2, 0, 0] = 11
    lengths = [*LENGTHS[:2], LENGTHS[0], LENGTHS[2]]
    mask = torch.arange(WIDTH) < torch.tensor(lengths)[..., None]
    result = torch.zeros(mask.shape, dtype=torch.float64).flatten(0, 1)
    batches = micro_batches(prompts, lengths, budget, ids.flatten(0, 1))
    for batch in batches:
        logprobs, _ = completion_logprobs(model, batch, ids.flatten(0, 1)[batch.rows], 0.7)
        result[batch.rows] = logprobs.detach()
    expected = [naive_logprobs(model, p, rows, 0.7) for p, rows in zip(prompts, ids)]
    assert (result.view(mask.shape) - torch.stack(expected).where(mask, 0)).abs().max() < 1e-12
    assert sorted(row for batch in batches for row in batch.rows.tolist()) == list(range(16))
    if not budget:
        assert len(batches[0].prompts) == 3
        # The prefixes of the first, those after another first token, and those of the others.
        assert sum(own_tokens(batches[0])) == 6 + 4 + 3 + 10


@pytest.mark.parametrize("budget", [0, 9])
def test_so_are_entropies(budget):
    model = make_model(dtype=torch.float64)
    expected = value_and_gradients(model, lambda m: entropies(m))
    ours = value_and_gradients(model, lambda m: packed(m, budget, entropy=True))
    assert_same(ours, expected, value=1e-10)


def test_every_distinct_prefix_is_read_once_and_scored_once(monkeypatch):
    model = make_model(dtype=torch.float64)
    read, scored = [], []
    model.get_decoder().embed_tokens.register_forward_hook(
        lambda module, inputs, output: read.append(inputs[0].numel())
    )
    model.get_decoder().norm.register_forward_hook(lambda *_: None)
    import training.logprobs as module

    original = module.token_logprobs

    def counted(model, hidden, *rest):
        scored.append(len(hidden))
        return original(model, hidden, *rest)

    monkeypatch.setattr(module, "token_logprobs", counted)
    packed(model)
    trees = [{tuple(row[:n]) for row in group for n in range(1, len(row) + 1)} for group in GROUPS]
    inner = [{tuple(row[:n]) for row in group for n in range(1, len(row))} for group in GROUPS]
    assert scored == [sum(map(len, trees))] == [19]
    begun = {tuple(prompt[:n].tolist()) for prompt in PROMPTS for n in range(1, len(prompt) + 1)}
    assert read == [len(begun) + sum(map(len, inner))] == [7 + 12]


def test_a_budget_counts_distinct_tokens():
    copies = torch.tensor([[3, 4, 5, 6]] * 8)
    prompt = [torch.tensor([1, 2])]
    assert len(micro_batches(prompt, [[4] * 8], 6, copies)) == 1
    assert len(micro_batches(prompt, [[4] * 8], 6)) == 8
    alike = [torch.tensor([1, 2, 3, 4, 5 + q]) for q in range(4)]  # 8 distinct tokens
    ids = torch.arange(8)[:, None]
    assert len(micro_batches(alike, [[1, 1]] * 4, 16, ids)) == 1
    assert len(micro_batches(alike, [[1, 1]] * 4, 15, ids)) == 2
    assert len(micro_batches(alike, [[1, 1]] * 4, 16)) == 2


@pytest.mark.parametrize("seed", range(20))
def test_numbers_are_those_of_a_dictionary_of_prefixes(seed):
    rng = random.Random(seed)
    rows = [[rng.randrange(rng.choice((1, 2, 50))) for _ in range(rng.randrange(9))]
            for _ in range(12)]  # fmt: skip
    question = sorted(rng.randrange(3) for _ in rows)
    ids = np.array([row + [rng.randrange(50)] * (9 - len(row)) for row in rows])
    numbers = prefix_numbers(ids, [len(row) for row in rows], question)
    seen = {}
    for q, row, of_row in zip(question, rows, numbers):
        assert (of_row[len(row) :] == -1).all()
        for n in range(len(row)):
            assert seen.setdefault((q, *row[: n + 1]), of_row[n]) == of_row[n]
    assert sorted(seen.values()) == list(range(len(seen)))  # no two prefixes, and no gap


def test_alone_shares_nothing():
    numbers = alone([2, 0, 3], 3)
    assert numbers.tolist() == [[0, 1, -1], [-1, -1, -1], [2, 3, 4]]


def test_first_places_and_what_stands_there():
    first, same = first_of_each(np.array([7, 3, 7, 7, 5, 3]))
    assert first.tolist() == [0, 1, 4]
    assert same.tolist() == [0, 1, 0, 0, 2, 1]


def test_own_tokens_are_what_a_completion_adds():
    [batch] = micro_batches(PROMPTS[:1], LENGTHS[:1], 0, IDS[0])
    assert batch.lengths == [4, 4, 4, 3]
    assert sorted(own_tokens(batch)) == [0, 0, 2, 4]
    assert sum(own_tokens(batch)) == 6
