"""The objective against hand-computed cases and an independent numpy reference."""

import itertools
import math

import numpy as np
import pytest
import torch
from toys import random_step

from grpo import (
    Batch,
    Objective,
    group_advantages,
    grpo_loss,
    has_signal,
    kl_estimate,
    max_variance_subset,
    token_weights,
)

AGGREGATIONS = ("grpo", "dapo", "dr_grpo")


def numpy_loss(logprobs, old, reference, advantages, mask, aggregation, low, high, beta, kind):
    """The loss and its gradient, token by token, from the papers' formulas."""
    questions, group_size, length = mask.shape
    loss, gradient = 0.0, np.zeros(mask.shape)
    for q in range(questions):
        for g in range(group_size):
            tokens = int(mask[q, g].sum())
            for t in range(tokens):
                weight = {
                    "grpo": 1 / (questions * group_size * max(tokens, 1)),
                    "dapo": 1 / int(mask.sum()),
                    "dr_grpo": 1 / (questions * group_size * length),
                }[aggregation]
                p, o, r = (float(x[q, g, t]) for x in (logprobs, old, reference))
                advantage = float(advantages[q, g])
                ratio = math.exp(p - o)
                bounded = min(max(ratio, 1 - low), 1 + high)
                clipped = bounded * advantage < ratio * advantage
                surrogate = bounded * advantage if clipped else ratio * advantage
                slope = 0.0 if clipped else ratio * advantage
                kl = {"k1": p - r, "k2": (p - r) ** 2 / 2, "k3": math.exp(r - p) - (r - p) - 1}
                kl_slope = {"k1": 1.0, "k2": p - r, "k3": 1 - math.exp(r - p)}
                loss -= weight * (surrogate - beta * kl[kind])
                gradient[q, g, t] = -weight * (slope - beta * kl_slope[kind])
    return loss, gradient


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_loss_and_gradient_match_the_numpy_reference(aggregation, kind):
    for seed in range(5):
        logprobs, old, reference, advantages, mask = random_step(seed)
        logprobs.requires_grad_()
        weights = token_weights(mask, aggregation, mask.shape[-1]).double()
        # token_weights is fp32; the reference gets weights computed in fp64
        counts = mask.sum(-1, keepdim=True).clamp(min=1)
        sequences = mask.shape[0] * mask.shape[1]
        exact = {
            "grpo": mask / (sequences * counts).double(),
            "dapo": mask / mask.sum().double(),
            "dr_grpo": mask / torch.tensor(sequences * mask.shape[-1]).double(),
        }[aggregation]
        assert torch.allclose(weights, exact, rtol=1e-6, atol=0)
        batch = Batch(old, advantages, exact, reference, old)
        loss, _ = grpo_loss(logprobs, batch, Objective(0.1, 0.3, kl_beta=0.2, kl_estimator=kind))
        loss.backward()
        expected, gradient = numpy_loss(
            logprobs.detach(), old, reference, advantages, mask, aggregation, 0.1, 0.3, 0.2, kind
        )
        assert loss.item() == pytest.approx(expected, abs=1e-10)
        assert np.abs(logprobs.grad.numpy() - gradient).max() < 1e-10


@pytest.mark.parametrize("group_size", range(2, 33))
@pytest.mark.parametrize("value", [0.0, 0.1, 0.7, 2.0 / 3.0, -1.3, 1e6])
def test_equal_rewards_give_zero_advantage(group_size, value):
    for scale in ("std", "none"):
        advantages = group_advantages(torch.full((2, group_size), value), scale)
        assert (advantages == 0).all()


def test_advantages_compare_within_the_group_only():
    rewards = torch.tensor([[1.0, 2.0, 3.0, 6.0], [10.0, 10.0, 10.0, 20.0]])
    centred = torch.tensor([[-2.0, -1.0, 0.0, 3.0], [-2.5, -2.5, -2.5, 7.5]])
    std = torch.tensor([[math.sqrt(14 / 3)], [5.0]])  # unbiased: divided by G - 1
    assert torch.allclose(group_advantages(rewards, "none"), centred)
    assert torch.allclose(group_advantages(rewards, "std"), centred / std, atol=1e-3)


def test_rewards_that_differ_by_rounding_alone_get_next_to_no_advantage():
    rewards = torch.tensor([[0.7, 0.7, 0.7, 0.7 + 6e-8]])  # one step of fp32
    assert rewards.unique().numel() == 2
    assert group_advantages(rewards, "std").abs().max() < 1e-2


def test_advantages_of_chosen_completions_compare_with_the_chosen_only():
    rewards = torch.tensor([[1.0, 9.0, 3.0, 2.0], [4.0, 4.0, 0.0, 7.0]])
    chosen = torch.tensor([[True, False, True, False], [True, True, False, False]])
    root = math.sqrt(2)  # the unbiased deviation of 1 and 3
    expected = torch.tensor([[-1 / root, 0.0, 1 / root, 0.0], [0.0] * 4])
    assert torch.allclose(group_advantages(rewards, "std", chosen), expected, atol=1e-4)
    assert group_advantages(rewards, "none", chosen).tolist() == [[-1.0, 0.0, 1.0, 0.0], [0.0] * 4]


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
def test_the_subset_of_largest_variance_is_that_of_all_subsets(size):
    generator = torch.Generator().manual_seed(size)
    rewards = torch.randint(0, 6, (40, 6), generator=generator).float() / 2
    chosen = max_variance_subset(rewards, size)
    assert (chosen.sum(-1) == size).all()
    for group, kept in zip(rewards, chosen):
        subsets = itertools.combinations(group.tolist(), size)
        best = max(np.var(subset) for subset in subsets)
        assert np.var(group[kept].tolist()) == pytest.approx(best, abs=1e-12)


def test_of_a_group_half_right_the_subset_is_half_right():
    rewards = torch.tensor([[0.0, 4.0, 0.0, 4.0, 0.0, 4.0, 0.0, 4.0], [1.0] * 8])
    chosen = max_variance_subset(rewards, 4)
    assert rewards[0][chosen[0]].sum() == 8
    assert chosen[1].sum() == 4  # a flat group is cut like any other


def test_of_equal_splits_the_one_with_more_high_rewards_wins():
    generator = torch.Generator().manual_seed(0)
    for size in (3, 5):
        low, high = torch.rand(2, 50, 1, generator=generator).sort(0).values
        rewards = torch.where(torch.arange(10) < 5, low, high)  # (50, 10)
        chosen = max_variance_subset(rewards, size)
        assert (chosen[:, 5:].sum(-1) == (size + 1) // 2).all()


def test_only_groups_with_unequal_rewards_carry_signal():
    assert has_signal(torch.tensor([[0.7, 0.7], [0.7, 0.8]])).tolist() == [False, True]


def test_weights_are_a_mean_over_as_many_sequences_as_are_named():
    mask = torch.ones(2, 2, 3, dtype=torch.bool)
    mask[1] = False
    assert token_weights(mask, "grpo", 3, sequences=2).sum() == pytest.approx(1.0)
    assert token_weights(mask, "grpo", 3).sum() == pytest.approx(0.5)
    assert token_weights(mask, "dr_grpo", 6, sequences=2).sum() == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "slope"),
    [
        (1.5, 1.0, 1.3, 0.0),  # better and already likelier: held at the upper bound
        (1.5, -1.0, -1.5, -1.5),  # worse but likelier: full gradient
        (0.5, 1.0, 0.5, 0.5),  # better but less likely: full gradient
        (0.5, -1.0, -0.9, 0.0),  # worse and already less likely: held at the lower bound
    ],
)
def test_clip_acts_on_two_of_the_four_cases(ratio, advantage, objective, slope):
    logprobs = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    weights = torch.ones(1, 1, dtype=torch.float64)
    advantages = torch.tensor([advantage], dtype=torch.float64)
    old = torch.zeros(1, 1, dtype=torch.float64)
    batch = Batch(old, advantages, weights, old_logprobs=old)
    loss, sums = grpo_loss(logprobs, batch, Objective(0.1, 0.3))
    loss.backward()
    assert loss.item() == pytest.approx(-objective)
    assert logprobs.grad.item() == pytest.approx(-slope)
    assert sums["clip_fraction"].item() == (slope == 0)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_any_cut_into_micro_batches_adds_up_to_the_same_loss_and_gradient(aggregation):
    logprobs, old, reference, advantages, mask = random_step(7, questions=1, group_size=7)
    weights = token_weights(mask, aggregation, mask.shape[-1]).double()

    def gradient(size):
        leaf = logprobs.clone().requires_grad_()
        total = 0.0
        for rows in torch.arange(7).split(size):
            batch = Batch(old[0], advantages[0], weights[0], reference[0], old[0]).rows(rows)
            loss, _ = grpo_loss(leaf[0, rows], batch, Objective(kl_beta=0.1))
            loss.backward()
            total += loss.item()
        return total, leaf.grad

    whole, expected = gradient(7)
    for size in (1, 2, 3, 4, 5):  # 7 = 3 + 3 + 1: the last part is smaller
        total, actual = gradient(size)
        assert total == pytest.approx(whole, abs=1e-12)
        assert (actual - expected).abs().max() < 1e-12


def test_masked_tokens_get_no_gradient_even_where_their_values_are_wild():
    logprobs = torch.tensor([[-1.0, 500.0, -math.inf]], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    old = torch.tensor([[-1.0, -500.0, 0.0]], dtype=torch.float64)
    batch = Batch(old, torch.ones(1).double(), weights, old.clone(), old_logprobs=old)
    loss, sums = grpo_loss(logprobs, batch, Objective(kl_beta=0.1))
    loss.backward()
    assert loss.item() == -1.0
    assert logprobs.grad.tolist() == [[-1.0, 0.0, 0.0]]
    assert sums["kl"].item() == 0.0


def test_nothing_left_to_train_on_gives_zero_loss():
    mask = torch.zeros(2, 3, 4, dtype=torch.bool)
    for aggregation in AGGREGATIONS:
        weights = token_weights(mask, aggregation, 4)
        batch = Batch(torch.zeros(2, 3, 4), torch.ones(2, 3), weights)
        loss, _ = grpo_loss(torch.zeros(2, 3, 4), batch, Objective())
        assert loss.item() == 0.0


def test_only_k2_has_the_gradient_of_the_reverse_kl():
    """Every token of a five-word vocabulary is enumerated, so the expectations are exact."""
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1, -0.4], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.0, 0.5, -0.2, 0.7, -1.0], dtype=torch.float64).log_softmax(-1)

    def gradient(function):
        return torch.autograd.grad(function(logits.log_softmax(-1)), logits)[0]

    def expected(estimator):
        """E over tokens drawn from the policy; the draw itself carries no gradient."""
        return gradient(lambda p: (p.exp().detach() * kl_estimate(p, reference, estimator)).sum())

    reverse = gradient(lambda p: (p.exp() * (p - reference)).sum())
    forward = gradient(lambda p: (reference.exp() * (reference - p)).sum())
    assert torch.allclose(expected("k2"), reverse, atol=1e-12)
    assert torch.allclose(expected("k3"), forward, atol=1e-12)
    assert expected("k1").abs().max() < 1e-12
    assert not torch.allclose(forward, reverse, atol=1e-2)


def test_kl_estimates_are_unbiased_and_k3_is_never_negative():
    policy = torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=torch.float64).log()
    reference = torch.tensor([0.25, 0.25, 0.3, 0.2], dtype=torch.float64).log()
    true_kl = (policy.exp() * (policy - reference)).sum()
    for estimator in ("k1", "k3"):
        estimate = (policy.exp() * kl_estimate(policy, reference, estimator)).sum()
        assert torch.isclose(estimate, true_kl)
    assert (kl_estimate(policy, reference, "k3") >= 0).all()
    assert (kl_estimate(policy, reference, "k1") < 0).any()
