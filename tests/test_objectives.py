"""Every ratio, clip, correction, bonus and penalty against its formula, alone and together."""

import itertools
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from conftest import make_args, make_model
from test_grpo import random_step
from test_llms import naive_logprobs
from test_main import ADVANTAGES, distance, gradients, rollouts_from, toy

import llms
import main
from evaluator import Rewards, with_overlong_penalty
from grpo import group_advantages, grpo_loss, overlong_penalty, token_weights
from launch.parser import parse_args
from llms import frozen_copy

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
        a, base = float(advantages[place]), f if tis_cap else o
        gaps = [p[t] - base[t] for t in tokens]
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
    loss, sums = grpo_loss(
        leaf, old, reference if beta else None, advantages, weights, low, high, beta,
        first_logprobs=first, entropy=entropy, **settings,
    )  # fmt: skip
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
        mismatch = (inputs[0] - inputs[1]).abs()[inputs[-1]].sum()  # of the sampler, whatever first
        assert sums["mismatch"].item() == pytest.approx(mismatch.item())
        clipped, capped = clipped + expected[3], capped + expected[4]
    assert clipped > 0 and (capped > 0) == (settings["tis_cap"] > 0)


def test_gspo_is_the_mean_over_sequences_of_their_clipped_ratio():
    logprobs, old, _, _, _, advantages, mask = inputs = random_inputs(3)
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


def test_the_penalty_is_a_reward_of_its_own_and_off_by_default():
    rewards = Rewards(["ok"], torch.tensor([[[1.0], [1.0]]]), torch.tensor([[2.0, 2.0]]))
    mask = torch.arange(10) < torch.tensor([[[10], [7]]])
    rollouts = SimpleNamespace(completion_mask=mask)
    args = SimpleNamespace(overlong_buffer=0, max_completion_length=10)
    assert with_overlong_penalty(rewards, rollouts, args) is rewards
    args.overlong_buffer = 4
    penalised = with_overlong_penalty(rewards, rollouts, args)
    assert penalised.names == ["ok", "overlong"]
    assert penalised.per_function.tolist() == [[[1.0, -1.0], [1.0, -0.25]]]
    assert penalised.total.tolist() == [[1.0, 1.75]]


def test_a_buffer_longer_than_the_completion_is_refused(capsys):
    argv = ["--preset", "cpu", "--overlong_buffer", "49"]
    with pytest.raises(SystemExit) as stop:
        parse_args(argv)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("main.py: error: --overlong_buffer 49: above --max_completion_length")
    assert message.count("\n") == 1


# --- entropy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 4, 1024])
@pytest.mark.parametrize("trained_head", [True, False])
def test_entropies_and_their_gradients_are_those_of_torch(chunk, trained_head, monkeypatch):
    monkeypatch.setattr(llms, "LOGPROB_CHUNK", chunk)
    monkeypatch.setattr(llms, "SOFTMAX_ROWS", 2)
    model = make_model(dtype=torch.float64)
    weight = model.get_output_embeddings().weight.requires_grad_(trained_head)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 32, dtype=torch.float64, generator=generator)
    ids = torch.randint(300, (9,), generator=generator)
    up = torch.randn(2, 9, dtype=torch.float64, generator=generator)
    results = []
    for ours in (True, False):
        leaf = hidden.clone().requires_grad_()
        model.zero_grad()
        if ours:
            logprobs, entropy = llms.token_logprobs(model, leaf, ids, 0.7, with_entropy=True)
        else:
            distribution = torch.distributions.Categorical(logits=leaf @ weight.T / 0.7)
            logprobs, entropy = distribution.log_prob(ids), distribution.entropy()
        (logprobs * up[0] + entropy * up[1]).sum().backward()
        to_weight = weight.grad if trained_head else torch.zeros(1)
        results.append((logprobs.detach(), entropy.detach(), leaf.grad, to_weight))
    for a, b in zip(*results):
        assert (a - b).abs().max() < 1e-11


def test_the_gradients_of_log_probs_and_entropies_are_finite_differences():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in ((3, 4), (6, 4))
    )
    ids = torch.tensor([5, 0, 2])
    assert torch.autograd.gradcheck(
        lambda h, w: llms.TokenLogprobs.apply(h, w, ids, True), (hidden, weight)
    )


# --- a whole update ----------------------------------------------------------------------------

UPDATES = [
    {"ratio": "sequence", "clip_epsilon": 0.05, "clip_epsilon_high": 0.05},
    {"clip": "cispo", "aggregation": "dapo"},
    {"tis_cap": 1.1},
    {"entropy_bonus": 0.05},
    {"ratio": "sequence", "clip": "cispo", "tis_cap": 1.1, "entropy_bonus": 0.05},
]


@pytest.fixture(scope="module")
def off_policy():
    """A model and rollouts of another, whose log-probs are that one's: no ratio is 1."""
    return toy(seed=1, initializer_range=0.1), rollouts_from(toy(initializer_range=0.1))


@pytest.mark.parametrize("flags", UPDATES, ids=named)
def test_an_update_with_any_objective_has_the_naive_gradient_however_it_is_cut(
    flags, off_policy, accelerator
):
    model, rollouts = off_policy
    reference = frozen_copy(toy(seed=2, initializer_range=0.1))
    settings = {"kl_beta": 0.1, "reference": reference, "temperature": 0.8, **flags}
    actual, metrics = gradients(model, rollouts, accelerator, **settings)
    prompts = list(zip(rollouts.prompt_ids, rollouts.completion_ids))
    mask = rollouts.completion_mask

    def scored(of):
        return torch.stack([naive_logprobs(of, prompt, ids, 0.8) for prompt, ids in prompts])

    logprobs = scored(model)
    entropy = torch.stack([
        torch.stack([
            torch.distributions.Categorical(
                logits=model(torch.cat([prompt, row])[None]).logits[0, len(prompt) - 1 : -1] / 0.8
            ).entropy()
            for row in ids
        ])
        for prompt, ids in prompts
    ])  # fmt: skip
    with torch.no_grad():
        ref = scored(reference)
    weights = token_weights(mask, flags.get("aggregation", "grpo"))
    names = ("ratio", "clip", "tis_cap", "entropy_bonus")
    loss, _ = grpo_loss(
        logprobs, rollouts.logprobs, ref, ADVANTAGES, weights,
        flags.get("clip_epsilon", 0.2), flags.get("clip_epsilon_high", 0.2), 0.1,
        first_logprobs=logprobs.detach(), entropy=entropy,
        **{name: flags[name] for name in names if name in flags},
    )  # fmt: skip
    assert distance(actual, torch.autograd.grad(loss, list(model.parameters()))) < 1e-5
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    parts, part_metrics = gradients(model, rollouts, accelerator, micro_batch_tokens=30, **settings)
    assert distance(parts, actual) < 1e-5
    assert part_metrics == pytest.approx(
        {**metrics, "tokens/padded": part_metrics["tokens/padded"]}, rel=1e-5, abs=1e-7
    )


def test_a_flat_group_takes_part_in_the_entropy_bonus(off_policy, accelerator):
    model, rollouts = off_policy
    flat = torch.zeros_like(ADVANTAGES)
    without, _ = gradients(model, rollouts, accelerator, advantages=flat)
    assert all((gradient == 0).all() for gradient in without)
    with_bonus, _ = gradients(model, rollouts, accelerator, advantages=flat, entropy_bonus=0.1)
    assert max(gradient.abs().max() for gradient in with_bonus) > 0


def test_the_correction_s_ratio_compares_with_the_first_epoch_and_its_weight_stays(
    off_policy, accelerator, monkeypatch
):
    """Epoch 1: ratio 1 though sampler and trainer differ. Later: against the trainer, not them."""
    _, rollouts = off_policy
    calls, original = [], main.grpo_loss

    def spy(logprobs, old, *rest, **named):
        loss, sums = original(logprobs, old, *rest, **named)
        calls.append((logprobs.detach(), old, named["first_logprobs"], sums))
        return loss, sums

    monkeypatch.setattr(main, "grpo_loss", spy)
    settings = {"tis_cap": 1.1, "num_inner_epochs": 2, "micro_batch_tokens": 30}
    moving = toy(seed=1, initializer_range=0.1)
    args = make_args(max_completion_length=10, **settings)
    optimizer, _ = main.make_optimizer(moving, args)
    metrics = main.update_policy(
        moving, None, optimizer, rollouts, ADVANTAGES, args, accelerator, main.Stopwatch()
    )
    passes = len(calls) // 2
    assert passes > 1
    moved = 0.0
    for first, second in zip(calls[:passes], calls[passes:]):
        assert torch.equal(first[2], first[0]) and torch.equal(second[2], first[0])
        assert first[3]["clip_fraction"] == 0 and first[3]["mismatch"] > 0
        assert first[3]["tis_capped"] == second[3]["tis_capped"]
        moved += (second[0] - first[0]).abs().max().item()
    assert moved > 0
    assert metrics["tis_capped"] > 0


# --- TRL ---------------------------------------------------------------------------------------


def trl_loss(inputs, loss_type, level, low, high, beta, cap, bonus):
    """Loss and gradients of TRL's GRPOTrainer on the same tensors, in one batch."""
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
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        use_vllm=cap > 0, vllm_importance_sampling_correction=True, entropy_coef=bonus,
        _entropy_bonus_enabled=bonus > 0, use_adaptive_entropy=False,
        current_gradient_accumulation_steps=1, model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            num_processes=1, sync_gradients=False, gather=lambda x: x, reduce=lambda x, **_: x
        ),
        _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    ids = torch.zeros(mask.shape, dtype=torch.long)
    loss = GRPOTrainer._compute_loss(trainer, None, {
        "prompt_ids": ids, "prompt_mask": mask, "completion_ids": ids, "completion_mask": mask,
        "advantages": advantages, "old_per_token_logps": first if cap else old,
        "ref_per_token_logps": reference, "num_items_in_batch": mask.sum(),
        "importance_sampling_ratio": (first - old).exp().clamp(max=cap) if cap else None,
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
