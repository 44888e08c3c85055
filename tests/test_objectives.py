"""Every ratio, clip, correction, bonus and penalty against its formula, alone and together."""

import itertools
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from toys import random_step

from grpo import Batch, Objective, group_advantages, grpo_loss, overlong_penalty, token_weights
from launch.parser import parse_args

AGGREGATIONS = ("grpo", "dapo", "dr_grpo")
COMBINATIONS = [
    {"ratio": ratio, "clip": clip, "tis_cap": cap, "entropy_bonus": bonus}
    for ratio, clip, cap, bonus in itertools.product(
        ("token", "sequence"), ("ppo", "cispo"), (0.0, 1.1), (0.0, 0.03)
    )
]


def named(settings):
    return "-".join(str(value) for value in settings.values())


def random_inputs(seed, **shape):
    """Log-probs now, at first, when sampled and of the reference, entropies, advantages, a mask."""
    logprobs, old, reference, advantages, mask = random_step(seed, **shape)
    generator = torch.Generator().manual_seed(seed + 100)
    first = old + 0.2 * torch.randn(old.shape, generator=generator, dtype=old.dtype)
    entropy = torch.rand(old.shape, generator=generator, dtype=old.dtype)
    return logprobs, old, first, reference, entropy, advantages, mask


def by_hand(inputs, weights, low, high, beta, ratio, clip, tis_cap, entropy_bonus):
    """Loss, gradients to log-probs and entropies, and tokens clipped and capped; in plain floats.

    A sequence's ratio s is exp of a mean, so d s / d logprob_t is s / |o| for each of its tokens.
    """
    logprobs, old, first, reference, entropy, advantages, mask = inputs
    loss, clipped, capped = 0.0, 0, 0
    gradient, to_entropy = torch.zeros_like(logprobs), torch.zeros_like(logprobs)
    for place in itertools.product(*map(range, mask.shape[:2])):
        tokens = range(int(mask[place].sum()))
        p, o, f, q, h, w = (
            x[place].tolist() for x in (logprobs, old, first, reference, entropy, weights)
        )
        a = float(advantages[place])
        gaps = [p[t] - f[t] for t in tokens]
        if ratio == "sequence" and gaps:
            gaps = [sum(gaps) / len(gaps)] * len(gaps)
        for t in tokens:
            r = math.exp(gaps[t])
            bounded = min(max(r, 1 - low), 1 + high)
            c = min(math.exp(f[t] - o[t]), tis_cap) if tis_cap else 1.0
            capped += tis_cap > 0 and math.exp(f[t] - o[t]) > tis_cap
            kl = math.exp(q[t] - p[t]) - (q[t] - p[t]) - 1
            if clip == "cispo":
                surrogate, inside = bounded * a * p[t], bounded == r
                gradient[place][t] -= w[t] * c * bounded * a
            else:
                surrogate = min(r * a, bounded * a)
                inside = surrogate == r * a
                touched = tokens if ratio == "sequence" else [t]
                for u in touched if inside else []:
                    gradient[place][u] -= w[t] * c * r * a / len(touched)
            clipped += not inside
            loss -= w[t] * (c * surrogate - beta * kl + entropy_bonus * h[t])
            gradient[place][t] += w[t] * beta * (1 - math.exp(q[t] - p[t]))
            to_entropy[place][t] = -w[t] * entropy_bonus
    return loss, gradient, to_entropy, clipped, capped


def computed(inputs, weights, low=0.2, high=0.2, beta=0.0, **settings):
    """The loss, its gradients to log-probs and entropies, and the sums."""
    logprobs, old, first, reference, entropy, advantages, _ = inputs
    leaf, entropy = logprobs.clone().requires_grad_(), entropy.clone().requires_grad_()
    batch = Batch(old, advantages, weights, reference if beta else None, first)
    loss, sums = grpo_loss(leaf, batch, Objective(low, high, beta, **settings), entropy)
    loss.backward()
    to_entropy = torch.zeros_like(leaf) if entropy.grad is None else entropy.grad
    return loss.item(), leaf.grad, to_entropy, sums


@pytest.mark.parametrize("settings", COMBINATIONS, ids=named)
def test_every_combination_has_the_loss_and_gradient_of_its_formula(settings):
    clipped, capped = 0, 0
    for seed, aggregation in enumerate(AGGREGATIONS):
        inputs = random_inputs(seed)
        weights = token_weights(inputs[-1], aggregation, 7).double()
        loss, gradient, to_entropy, sums = computed(inputs, weights, 0.1, 0.15, 0.2, **settings)
        expected = by_hand(inputs, weights, 0.1, 0.15, 0.2, **settings)
        assert loss == pytest.approx(expected[0], abs=1e-12)
        assert (gradient - expected[1]).abs().max() < 1e-12
        assert (to_entropy - expected[2]).abs().max() < 1e-12
        assert sums["clip_fraction"] == expected[3]
        assert sums.get("tis_capped", 0) == expected[4]
        # Between sampler and trainer, whatever has been learnt since.
        mismatch = (inputs[2] - inputs[1]).abs()[inputs[-1]].sum()
        assert sums["mismatch"].item() == pytest.approx(mismatch.item())
        clipped, capped = clipped + expected[3], capped + expected[4]
    assert clipped > 0 and (capped > 0) == (settings["tis_cap"] > 0)


def test_gspo_is_the_mean_over_sequences_of_their_clipped_ratio():
    logprobs, _, old, _, _, advantages, mask = inputs = random_inputs(3)
    counts = mask.sum(-1)
    ratio = ((logprobs - old) * mask).sum(-1).div(counts.clamp(min=1)).exp()  # (Q, G)
    clipped = ratio.clamp(1 - 0.01, 1 + 0.02)
    expected = torch.minimum(ratio * advantages, clipped * advantages)[counts > 0].sum() / 12
    weights = token_weights(mask, "grpo").double()
    loss, *_, sums = computed(inputs, weights, 0.01, 0.02, ratio="sequence")
    assert loss == pytest.approx(-expected.item(), abs=1e-6)
    assert sums["clip_fraction"] == counts[clipped * advantages < ratio * advantages].sum()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_on_policy_all_ratios_clips_and_corrections_have_one_gradient(aggregation):
    inputs = list(random_inputs(5))
    inputs[1] = inputs[2] = inputs[0]  # sampled and first log-probs are today's
    weights = token_weights(inputs[-1], aggregation, 7).double()
    _, expected, _, _ = computed(inputs, weights)
    assert expected.abs().max() > 0
    for ratio, clip, cap in itertools.product(("token", "sequence"), ("ppo", "cispo"), (0.0, 2.0)):
        _, gradient, _, sums = computed(inputs, weights, ratio=ratio, clip=clip, tis_cap=cap)
        assert (gradient - expected).abs().max() < 1e-12
        assert sums["clip_fraction"] == 0


def test_off_policy_they_do_not():
    inputs = random_inputs(5)
    weights = token_weights(inputs[-1], "grpo", 7).double()
    settings = [{}, {"ratio": "sequence"}, {"clip": "cispo"}, {"tis_cap": 2.0}]
    found = [computed(inputs, weights, **setting)[1] for setting in settings]
    for one, other in itertools.combinations(found, 2):
        assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("settings", COMBINATIONS, ids=named)
def test_any_cut_into_micro_batches_adds_up_whatever_the_objective(settings):
    inputs = random_inputs(7, questions=1, group_size=7)
    weights = token_weights(inputs[-1], "dapo", 7).double()
    loss, gradient, to_entropy, _ = computed(inputs, weights, beta=0.1, **settings)
    parts = [
        computed([x[:, rows] for x in inputs], weights[:, rows], beta=0.1, **settings)
        for rows in torch.arange(7).split(3)
    ]
    assert sum(part[0] for part in parts) == pytest.approx(loss, abs=1e-12)
    assert (torch.cat([part[1] for part in parts], 1) - gradient).abs().max() < 1e-12
    assert (torch.cat([part[2] for part in parts], 1) - to_entropy).abs().max() < 1e-12


def test_what_stands_at_padded_places_never_matters():
    inputs = [x.clone() for x in random_inputs(2)]
    weights = token_weights(inputs[-1], "dapo", 7).double()
    wild = [x.masked_fill(~inputs[-1], value) for x, value in zip(
        inputs[:5], (500.0, -500.0, math.inf, -math.inf, math.nan)
    )] + inputs[5:]  # fmt: skip
    for settings in COMBINATIONS:
        tame = computed(inputs, weights, beta=0.1, **settings)
        for a, b in zip(tame[:3], computed(wild, weights, beta=0.1, **settings)[:3]):
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def test_leaving_one_out_compares_with_the_mean_of_the_others():
    rewards = torch.tensor([[1.0, 2.0, 3.0, 6.0], [1.0, 1.0, 1.0, 1.0]])
    others = torch.tensor([[11 / 3, 10 / 3, 3.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    advantages = group_advantages(rewards, "none", baseline="leave_one_out")
    assert torch.allclose(advantages, rewards - others)
    chosen = torch.tensor([[True, False, True, True], [True, True, True, True]])
    advantages = group_advantages(rewards, "none", chosen, "leave_one_out")
    assert torch.allclose(advantages[0], torch.tensor([-3.5, 0.0, -0.5, 4.0]))
    scaled = group_advantages(rewards, "std", baseline="leave_one_out")
    assert torch.allclose(scaled, group_advantages(rewards, "std") * 4 / 3)
    assert (scaled[1] == 0).all()


# --- the penalty for length --------------------------------------------------------------------


def test_the_penalty_begins_where_the_buffer_does_and_ends_at_minus_one():
    lengths = torch.tensor([1, 80, 81, 90, 99, 100])
    penalty = overlong_penalty(lengths, 100, 20)
    assert penalty.tolist() == pytest.approx([0, 0, -0.05, -0.5, -0.95, -1])


def test_a_buffer_longer_than_the_completion_is_refused(capsys):
    argv = ["--preset", "cpu", "--overlong_buffer", "49"]
    with pytest.raises(SystemExit) as stop:
        parse_args(argv)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("main.py: error: --overlong_buffer 49: above --max_completion_length")
    assert message.count("\n") == 1


# --- entropy -----------------------------------------------------------------------------------


# --- a whole update ----------------------------------------------------------------------------


# --- TRL ---------------------------------------------------------------------------------------


def trl_loss(
    inputs, loss_type, level, low, high, beta, cap, bonus, delta=None, correction=None,
    trainer_class=None,
):  # fmt: skip
    """Loss and gradients of TRL's GRPOTrainer on the same tensors, in one batch. correction: its
    importance weights, where they are not those of the cap."""
    from trl import GRPOTrainer

    logprobs, old, first, reference, entropy, advantages, mask = (
        x.flatten(0, 1) if x.ndim == 3 else x.flatten() for x in inputs
    )
    leaf, entropy = logprobs.clone().requires_grad_(), entropy.clone().requires_grad_()
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (leaf, entropy, None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level=level, loss_type=loss_type, beta=beta, epsilon_low=low,
        epsilon_high=1 + high if loss_type == "cispo" else high, max_completion_length=7,
        args=SimpleNamespace(
            use_bias_correction_kl=False, delta=delta, steps_per_generation=1,
            sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
        ),
        use_vllm=cap > 0 or correction is not None, vllm_importance_sampling_correction=True,
        entropy_coef=bonus,
        _entropy_bonus_enabled=bonus > 0, use_adaptive_entropy=False,
        current_gradient_accumulation_steps=1, model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            num_processes=1, sync_gradients=False, gather=lambda x: x, reduce=lambda x, **_: x
        ),
        _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    ids = torch.zeros(mask.shape, dtype=torch.long)
    if cap:
        correction = (first - old).exp().clamp(max=cap)
    loss = (trainer_class or GRPOTrainer)._compute_loss(trainer, None, {
        "prompt_ids": ids, "prompt_mask": mask, "completion_ids": ids, "completion_mask": mask,
        "advantages": advantages, "old_per_token_logps": first,
        "ref_per_token_logps": reference, "num_items_in_batch": mask.sum(),
        "importance_sampling_ratio": correction,
    })  # fmt: skip
    loss.backward()
    to_entropy = torch.zeros_like(leaf) if entropy.grad is None else entropy.grad
    return loss.item(), leaf.grad, to_entropy


@pytest.mark.benchmark
@pytest.mark.parametrize("cap", [0.0, 1.1])
@pytest.mark.parametrize(
    ("loss_type", "aggregation", "ratio", "bonus"),
    [
        ("grpo", "grpo", "token", 0.0),
        ("grpo", "grpo", "sequence", 0.0),  # GSPO
        ("dapo", "dapo", "token", 0.03),  # elsewhere TRL's bonus has a mean of its own
        ("dr_grpo", "dr_grpo", "token", 0.0),
        ("cispo", "dapo", "token", 0.03),
    ],
)
def test_trl_has_the_same_loss_and_gradient(loss_type, aggregation, ratio, bonus, cap):
    clip = "cispo" if loss_type == "cispo" else "ppo"
    low = 1.0 if clip == "cispo" else 0.1  # TRL bounds it from above alone
    for seed in range(5):
        inputs = random_inputs(seed)
        weights = token_weights(inputs[-1].double(), aggregation, 7)
        ours = computed(
            inputs, weights.double(), low, 0.15, 0.2, ratio=ratio, clip=clip, tis_cap=cap,
            entropy_bonus=bonus,
        )  # fmt: skip
        theirs = trl_loss(inputs, loss_type, ratio, low, 0.15, 0.2, cap, bonus)
        assert ours[0] == pytest.approx(theirs[0], abs=1e-6)
        for a, b in zip(ours[1:], theirs[1:]):
            assert (a.flatten(0, 1) - b).abs().max() < 1e-6


@pytest.mark.benchmark
def test_trl_has_the_same_penalty_for_length():
    from trl.rewards import get_soft_overlong_punishment

    lengths = torch.arange(1, 41)
    theirs = get_soft_overlong_punishment(40, 12)([[0] * length for length in lengths])
    assert overlong_penalty(lengths, 40, 12).tolist() == pytest.approx(theirs)
