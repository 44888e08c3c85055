"""Tokens counted by hand."""

from types import SimpleNamespace

import torch

from records.budget import budget, budget_lines, sampled_counts, trained_counts
from training.shared_prefix import micro_batches

LENGTHS = [[4, 1, 2], [3, 3, 5]]


def test_sampled_counts_are_counted_by_group_and_by_end():
    mask = torch.arange(6) < torch.tensor(LENGTHS)[:, :, None]  # (Q, G, C)
    finished = torch.tensor([[True, False, True], [True, True, False]])
    rollouts = SimpleNamespace(completion_mask=mask, finished=finished)
    rewards = torch.tensor([[1.0, 0.0, 1.0], [2.0, 2.0, 2.0]])
    assert sampled_counts(rollouts, rewards) == {
        "tokens/sampled": 18, "tokens/flat": 11, "tokens/truncated": 6, "completions/sampled": 6,
    }  # fmt: skip


def test_trained_are_those_with_an_advantage_and_with_a_kl_term_all():
    prompts = [torch.arange(7), torch.arange(2)]
    advantages = [1.0, -1.0, 0.0, 0.0, 0.5, -0.5]
    one_pass = micro_batches(prompts, LENGTHS, 0)
    # Prompts 7 and 2: 5 places without a token; completions: 6 x 5 - 18 = 12.
    assert trained_counts(one_pass, advantages, kl=False) == {
        "tokens/trained": 4 + 1 + 3 + 5, "tokens/padded": 17, "completions/trained": 4,
    }  # fmt: skip
    assert trained_counts(one_pass, advantages, kl=True)["tokens/trained"] == 18
    each_alone = micro_batches(prompts, LENGTHS, 1)
    assert trained_counts(each_alone, advantages, kl=False) == {
        "tokens/trained": 13, "tokens/padded": 0, "completions/trained": 4,
    }  # fmt: skip
    assert set(trained_counts([], [], kl=False).values()) == {0}


def test_the_budget_is_the_sum_over_steps_and_stages_stand_in_their_order():
    rows = [
        {"step": 0, "seconds/policy": 2.0, "seconds/sampling": 1.0, "tokens/sampled": 10},
        {"step": 1, "seconds/policy": 3.0, "seconds/novel": 1.0, "tokens/sampled": None},
    ]
    seconds, tokens, completions = budget(rows)
    assert list(seconds.items()) == [("sampling", 1.0), ("policy", 5.0), ("novel", 1.0)]
    assert tokens == {"sampled": 10} and completions == {}
    assert budget_lines([]) == []
