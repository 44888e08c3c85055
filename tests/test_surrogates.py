"""Dual clip, SAPO, GMPO, the corrections' forms, uncertain tokens, the entropy target: each against
a loop over tokens, and against TRL. The default is what it was, to the last bit."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from test_objectives import AGGREGATIONS, computed, random_inputs, trl_loss

from grpo import Batch, Objective, entropy_weight, grpo_loss, most_uncertain, token_weights

LOW, HIGH = 0.1, 0.15
CLIPS = [{"clip": "ppo", "clip_delta": 1.3}, {"clip": "sapo"}, {"clip": "gmpo"}]
FORMS = [
    {"tis_form": f"{level}_{bound}", "tis_cap": 1.1, "tis_floor": 0.85}
    for level, bound in itertools.product(("token", "sequence"), ("truncate", "mask"))
]
COMBINATIONS = [*CLIPS, *FORMS, *({**c, **f} for c, f in zip(CLIPS, FORMS[1:]))]


def sign(x):
    return (x > 0) - (x < 0)


def completion_by_loop(p, first, sampled, advantage, settings):
    """[c_t S_t] of one completion, from the papers' formulas, token by token; p has a gradient."""
    a, form = advantage, settings.get("tis_form", "token_truncate")
    corrections = [math.exp(f - s) for f, s in zip(first, sampled)]
    if form.startswith("sequence"):
        corrections = [math.prod(corrections)] * len(corrections)
    cap, floor = settings.get("tis_cap", 0.0), settings.get("tis_floor", 0.0)
    if not cap:
        corrections = [1.0] * len(corrections)
    elif form.endswith("mask"):
        corrections = [c if floor <= c <= cap else 0.0 for c in corrections]
    else:
        corrections = [min(max(c, floor), cap) for c in corrections]
    ratios = [torch.exp(x - f) for x, f in zip(p, first)]
    if not ratios:
        return []
    clip = settings.get("clip", "ppo")
    if clip == "gmpo":  # eq. 4: (prod min(r^sgn A, clip(r, e^-low, e^high)^sgn A))^(1/|o| sgn A) A
        product = torch.ones((), dtype=p.dtype)
        for r in ratios:
            inside = torch.clamp(r, math.exp(-LOW), math.exp(HIGH))
            product = product * torch.minimum(r ** sign(a), inside ** sign(a))
        surrogates = [product ** (sign(a) / len(ratios)) * a] * len(ratios)
    elif clip == "sapo":
        tau = 1.0 if a > 0 else 1.05
        surrogates = [4 / tau / (1 + torch.exp(-tau * (r - 1))) * a for r in ratios]
    else:
        surrogates, d = [], settings.get("clip_delta", 0.0)
        for r in ratios:
            least = torch.minimum(r * a, torch.clamp(r, 1 - LOW, 1 + HIGH) * a)
            # Dual clip, as it was written first: max(..., d A) where A is negative.
            surrogates.append(torch.clamp(least, min=d * a) if d and a < 0 else least)
    return [c * s for c, s in zip(corrections, surrogates)]


def by_loop(inputs, weights, settings, acting=None):
    logprobs, sampled, first, _, _, advantages, mask = inputs
    leaf, loss = logprobs.clone().requires_grad_(), 0.0
    for place in itertools.product(*map(range, mask.shape[:2])):
        tokens = int(mask[place].sum())
        terms = completion_by_loop(
            leaf[place][:tokens], first[place][:tokens].tolist(),
            sampled[place][:tokens].tolist(), float(advantages[place]), settings,
        )  # fmt: skip
        for t, term in enumerate(terms):
            if acting is None or acting[place][t]:
                loss = loss - float(weights[place][t]) * term
    return loss.item(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("settings", COMBINATIONS, ids=str)
def test_each_has_the_loss_and_the_gradient_of_its_formula(settings):
    held = 0
    for seed, aggregation in enumerate(AGGREGATIONS):
        inputs = random_inputs(seed)
        weights = token_weights(inputs[-1], aggregation, 7).double()
        loss, gradient, _, sums = computed(inputs, weights, LOW, HIGH, **settings)
        expected, expected_gradient = by_loop(inputs, weights, settings)
        assert loss == pytest.approx(expected, abs=1e-12)
        assert (gradient - expected_gradient).abs().max() < 1e-12
        held += int(sums["clip_fraction"]) + int(sums.get("tis_capped", 0))
    assert held > 0 or settings == {"clip": "sapo"}


@pytest.mark.parametrize("settings", COMBINATIONS, ids=str)
def test_however_the_step_is_cut_the_parts_add_up(settings):
    inputs = random_inputs(7, questions=1, group_size=7)
    weights = token_weights(inputs[-1], "dapo", 7).double()
    loss, gradient, *_ = computed(inputs, weights, beta=0.1, **settings)
    parts = [
        computed([x[:, rows] for x in inputs], weights[:, rows], beta=0.1, **settings)
        for rows in torch.arange(7).split(3)
    ]
    assert sum(part[0] for part in parts) == pytest.approx(loss, abs=1e-12)
    assert (torch.cat([part[1] for part in parts], 1) - gradient).abs().max() < 1e-12


@pytest.mark.parametrize("settings", COMBINATIONS, ids=str)
def test_what_stands_at_padding_never_matters(settings):
    inputs = [x.clone() for x in random_inputs(2)]
    weights = token_weights(inputs[-1], "dapo", 7).double()
    wild = [x.masked_fill(~inputs[-1], value) for x, value in zip(
        inputs[:3], (500.0, -math.inf, math.inf)
    )] + inputs[3:]  # fmt: skip
    for a, b in zip(computed(inputs, weights, **settings)[:2], computed(wild, weights, **settings)):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


@pytest.mark.parametrize("clip", CLIPS, ids=str)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_on_policy_every_clip_has_the_default_s_gradient(clip, aggregation):
    inputs = list(random_inputs(5))
    inputs[1] = inputs[2] = inputs[0]
    weights = token_weights(inputs[-1], aggregation, 7).double()
    _, expected, *_ = computed(inputs, weights)
    _, gradient, _, sums = computed(inputs, weights, **clip)
    assert (gradient - expected).abs().max() < 1e-12
    assert sums["clip_fraction"] == 0


def test_a_bad_token_that_became_likely_costs_no_more_than_delta():
    logprobs = torch.tensor([[math.log(9.0), math.log(3.0)]], requires_grad=True)
    weights, nothing = torch.ones(1, 2), torch.zeros(1, 2)
    batch = Batch(nothing, torch.tensor([-1.0]), weights, old_logprobs=nothing)
    loss, sums = grpo_loss(logprobs, batch, Objective(clip_delta=4.0))
    loss.backward()
    assert loss.item() == pytest.approx(4.0 + 3.0)
    assert logprobs.grad.tolist() == [[0.0, pytest.approx(3.0)]]
    assert sums["clip_fraction"] == 1


def test_sapo_closes_softly_on_both_sides_and_faster_for_bad_tokens():
    """Eq. 6: the weight of the gradient is 4 p (1 - p) r with p = sigmoid(tau (r - 1))."""
    for a, tau in ((1.0, 1.0), (-1.0, 1.05)):
        for ratio in (0.4, 1.0, 2.5):
            leaf = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
            zero = torch.zeros(1, 1, dtype=torch.float64)
            batch = Batch(zero, torch.tensor([a]).double(), zero + 1, old_logprobs=zero)
            loss, _ = grpo_loss(leaf, batch, Objective(clip="sapo"))
            loss.backward()
            p = 1 / (1 + math.exp(-tau * (ratio - 1)))
            assert leaf.grad.item() == pytest.approx(-4 * p * (1 - p) * ratio * a, abs=1e-12)


def test_one_token_far_off_masks_its_completion_or_itself():
    gaps = torch.tensor([[0.0, math.log(6.0)], [0.1, 0.1]]).double()
    zero = torch.zeros(2, 2).double()
    batch = Batch(-gaps, torch.ones(2).double(), zero + 1, old_logprobs=zero)

    def gradient(form, floor=0.0):
        leaf = zero.clone().requires_grad_()
        loss, sums = grpo_loss(leaf, batch, Objective(tis_cap=5, tis_floor=floor, tis_form=form))
        loss.backward()
        return -leaf.grad, int(sums["tis_capped"])

    e, f = math.exp(0.1), math.exp(0.2)
    for form, expected, held in (
        ("token_mask", [[1, 0], [e, e]], 1), ("token_truncate", [[1, 5], [e, e]], 1),
        ("sequence_mask", [[0, 0], [f, f]], 2), ("sequence_truncate", [[5, 5], [f, f]], 2),
    ):  # fmt: skip
        found, count = gradient(form)
        assert torch.allclose(found, torch.tensor(expected).double()) and count == held
    found, count = gradient("token_mask", floor=1.05)
    assert torch.allclose(found, torch.tensor([[0, 0], [e, e]]).double()) and count == 2


# --- the most uncertain tokens -------------------------------------------------------------------


def test_the_threshold_keeps_the_share_that_was_asked_for():
    entropy = torch.tensor([0.3, 2.0, 0.1, 0.9, 1.5, 0.2, 0.0, 0.4, 0.7, 0.6])
    for share, count in ((0.2, 2), (0.25, 3), (1.0, 10), (0.01, 1)):
        kept = entropy >= most_uncertain(entropy, share)
        assert kept.sum() == count
        assert set(entropy[kept].tolist()) == set(sorted(entropy.tolist())[-count:])


def test_elsewhere_the_advantage_has_no_gradient_and_kl_and_bonus_keep_theirs():
    inputs = random_inputs(3)
    logprobs, sampled, first, reference, entropy, advantages, mask = inputs
    weights = token_weights(mask, "dapo").double()
    acting = entropy >= most_uncertain(entropy[mask], 0.3)
    assert 0 < (acting & mask).sum() < mask.sum()

    def gradient(advantages, acting=None):
        leaf = logprobs.clone().requires_grad_()
        batch = Batch(sampled, advantages, weights, reference, first, acting)
        loss, _ = grpo_loss(leaf, batch, Objective(LOW, HIGH, 0.2, entropy_bonus=0.1), entropy)
        loss.backward()
        return loss.item(), leaf.grad

    plain = by_loop(inputs, weights, {}, acting)
    rest = gradient(torch.zeros_like(advantages))
    loss, found = gradient(advantages, acting)
    assert loss == pytest.approx(plain[0] + rest[0], abs=1e-12)
    assert (found - plain[1] - rest[1]).abs().max() < 1e-12
    assert (found - rest[1])[~acting].abs().max() == 0


# --- the entropy target --------------------------------------------------------------------------


def test_the_bonus_falls_from_all_of_it_at_entropy_0_to_nothing_at_the_target():
    assert [entropy_weight(0.1, h, 0.5) for h in (0.0, 0.25, 0.5, 3.0)] == [0.1, 0.05, 0, 0]
    assert entropy_weight(0.1, 3.0, 0.0) == 0.1


# --- the default ---------------------------------------------------------------------------------


def as_it_was(leaf, batch, objective):
    """The default loss as it stood before there was anything else to choose."""
    padding = batch.weights == 0
    logprobs, old = (x.masked_fill(padding, 0.0) for x in (leaf, batch.old_logprobs))
    ratios = (logprobs - old).exp()
    bounded = ratios.clamp(1 - objective.clip_epsilon, 1 + objective.clip_epsilon_high)
    advantages = batch.advantages.unsqueeze(-1)
    gain = torch.minimum(ratios * advantages, bounded * advantages)
    log_ratio = batch.ref_logprobs.masked_fill(padding, 0.0) - logprobs
    gain = gain - objective.kl_beta * (log_ratio.exp() - 1 - log_ratio)
    return -(batch.weights * gain).sum()


def test_the_default_is_what_it_was_to_the_last_bit():
    for seed in range(5):
        *inputs, mask = random_inputs(seed)
        logprobs, sampled, first, reference, _ = (x.flatten(0, 1).float() for x in inputs[:5])
        weights = token_weights(mask, "grpo").flatten(0, 1)
        batch = Batch(sampled, inputs[5].flatten().float(), weights, reference, first)
        objective = Objective(kl_beta=0.04)
        ours, theirs = (logprobs.clone().requires_grad_() for _ in range(2))
        loss, _ = grpo_loss(ours, batch, objective)
        expected = as_it_was(theirs, batch, objective)
        loss.backward()
        expected.backward()
        assert torch.equal(loss, expected) and torch.equal(ours.grad, theirs.grad)


# --- TRL ---------------------------------------------------------------------------------------


@pytest.mark.benchmark
@pytest.mark.parametrize(
    "settings", [{"clip": "ppo", "clip_delta": 1.3}, {"clip": "sapo"}], ids=str
)
@pytest.mark.parametrize("form", [{}, *FORMS], ids=str)
def test_trl_has_the_same_loss_and_gradient(settings, form):
    loss_type = "sapo" if settings["clip"] == "sapo" else "grpo"
    for seed in range(5):
        inputs = random_inputs(seed)
        _, sampled, first, *_, mask = inputs
        gap = ((first - sampled) * mask).flatten(0, 1)
        level, _, bound = form.get("tis_form", "token_truncate").partition("_")
        if level == "sequence":
            gap = gap.sum(-1, keepdim=True)
        ratio = gap.exp()
        outside = (ratio < 0.85) | (ratio > 1.1)
        ratio = ratio.masked_fill(outside, 0) if bound == "mask" else ratio.clamp(0.85, 1.1)
        weights = token_weights(mask.double(), "grpo").double()
        ours = computed(inputs, weights, LOW, HIGH, 0.2, **settings, **form)
        theirs = trl_loss(
            inputs, loss_type, "token", LOW, HIGH, 0.2, 0.0, 0.0,
            delta=settings.get("clip_delta"), correction=ratio if form else None,
        )  # fmt: skip
        assert ours[0] == pytest.approx(theirs[0], abs=1e-6)
        assert (ours[1].flatten(0, 1) - theirs[1]).abs().max() < 1e-6


@pytest.mark.benchmark
def test_trl_has_the_same_gmpo():
    from trl.experimental.gmpo import GMPOTrainer

    for seed in range(5):
        inputs = random_inputs(seed)
        advantages, mask = inputs[5:]
        weights = token_weights(mask.double(), "grpo").double()
        ours = computed(inputs, weights, LOW, HIGH, 0.2, clip="gmpo")
        theirs = trl_loss(
            inputs, "gmpo", "token", LOW, HIGH, 0.2, 0.0, 0.0, trainer_class=GMPOTrainer
        )
        # An empty completion is s = 1 and no token there, and no term here.
        empty = mask.sum(-1) == 0
        constant = (advantages[empty].sum() / mask[..., 0].numel()).item()
        assert ours[0] == pytest.approx(theirs[0] + constant, abs=1e-6)
        assert (ours[1].flatten(0, 1) - theirs[1]).abs().max() < 1e-6


@pytest.mark.benchmark
def test_trl_takes_the_same_tokens_for_uncertain():
    from trl import GRPOTrainer

    trainer = SimpleNamespace(accelerator=SimpleNamespace(
        pad_across_processes=lambda x, **_: x, gather=lambda x: x
    ))  # fmt: skip
    for seed in range(20):
        entropy, mask = (random_inputs(seed)[i] for i in (4, 6))
        entropy = entropy.float()
        theirs = GRPOTrainer.get_high_entropy_mask(trainer, entropy, mask, 1 - 0.2)
        ours = mask & (entropy >= most_uncertain(entropy[mask], 0.2))
        assert torch.equal(ours, theirs)
