"""Tokens counted by hand."""

from types import SimpleNamespace

import torch

from records.budget import budget, budget_lines, sampled_counts

LENGTHS = [[4, 1, 2], [3, 3, 5]]


def test_sampled_counts_are_counted_by_group_and_by_end():
    mask = torch.arange(6) < torch.tensor(LENGTHS)[:, :, None]  # (Q, G, C)
    finished = torch.tensor([[True, False, True], [True, True, False]])
    ids = torch.tensor([  # behind an end stands anything
        [[1, 2, 3, 4, 9, 9], [1, 9, 8, 9, 9, 9], [1, 3, 9, 9, 9, 9]],
        [[1, 2, 3, 9, 9, 9], [1, 2, 3, 8, 8, 8], [1, 2, 3, 4, 5, 9]],
    ])  # fmt: skip
    rollouts = SimpleNamespace(
        texts=[["a", "b", "c"]] * 2, completion_mask=mask, finished=finished, completion_ids=ids
    )
    rewards = torch.tensor([[1.0, 0.0, 1.0], [2.0, 2.0, 2.0]])
    assert sampled_counts(rollouts, rewards) == {
        "tokens/sampled": 18, "tokens/distinct": 5 + 5, "tokens/flat": 11, "tokens/truncated": 6,
        "completions/sampled": 6,
    }  # fmt: skip


def test_the_budget_is_the_sum_over_steps_and_stages_stand_in_their_order():
    rows = [
        {"step": 0, "seconds/policy": 2.0, "seconds/sampling": 1.0, "tokens/sampled": 10},
        {"step": 1, "seconds/policy": 3.0, "seconds/novel": 1.0, "tokens/sampled": None},
    ]
    seconds, tokens, completions = budget(rows)
    assert list(seconds.items()) == [("sampling", 1.0), ("policy", 5.0), ("novel", 1.0)]
    assert tokens == {"sampled": 10} and completions == {}
    assert budget_lines([]) == []
