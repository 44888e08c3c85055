"""One update against naive references, whatever the objective, and what it counts."""

import dataclasses
import math
import weakref

import pytest
import torch
from accelerate import Accelerator
from conftest import make_args, make_model, make_setup, make_tokenizer
from toys import ADVANTAGES, Words, distance, gradients, naive_logprobs, rollouts_from, seeds, toy

from evaluation.comparison import summarize
from evaluation.held_out import evaluate
from evaluation.scoring import score
from evaluator import REWARD_FUNCTIONS
from grpo import Batch, group_advantages, grpo_loss, token_weights
from llms import chat_prompt, frozen_copy
from rldatasets import Problem, Problems
from sampling.groups import sample_groups, sample_rollouts
from sampling.turns import worked_ids
from training import sharding, update
from training.cold_start import cold_start
from training.optimizer import make_optimizer
from training.shared_prefix import micro_batches
from training.update import Pass, objective_of, trained_counts, update_policy


def norm_of(gradients):
    return math.sqrt(sum(g.square().sum().item() for g in gradients))


# --- one update --------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("kl_beta", [0.1, 0.0])
def test_the_update_s_gradient_is_that_of_the_naive_loss(aggregation, kl_beta, accelerator):
    """Without a reference the flat group takes no part, but still counts in what is averaged."""
    model = toy()
    rollouts = rollouts_from(model, temperature=0.8)
    reference = frozen_copy(toy(seed=1))
    actual, metrics = gradients(
        model, rollouts, accelerator, reference=reference if kl_beta else None,
        aggregation=aggregation, kl_beta=kl_beta, temperature=0.8,
    )  # fmt: skip
    model.zero_grad()
    mask = rollouts.completion_mask
    loss, kl_total = 0.0, 0.0
    for q in range(3):
        ids = rollouts.completion_ids[q]
        logprobs = naive_logprobs(model, rollouts.prompt_ids[q], ids, 0.8)
        with torch.no_grad():
            ref = naive_logprobs(reference, rollouts.prompt_ids[q], ids, 0.8)
        for g in range(4):
            tokens = int(mask[q, g].sum())
            weight = {"grpo": 1 / (12 * tokens), "dapo": 1 / int(mask.sum()), "dr_grpo": 1 / 120}
            for t in range(tokens):
                gap = ref[g, t] - logprobs[g, t]
                kl = gap.exp() - gap - 1
                ratio = (logprobs[g, t] - logprobs[g, t].detach()).exp()
                loss = loss - weight[aggregation] * (ratio * ADVANTAGES[q, g] - kl_beta * kl)
                kl_total += kl.item()
    loss.backward()
    expected = [p.grad for p in model.parameters()]
    assert distance(actual, expected) < 1e-5
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-6)
    if kl_beta:
        assert metrics["kl"] == pytest.approx(kl_total / int(mask.sum()), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(norm_of(expected), rel=1e-5)


def test_nothing_of_a_pass_is_left_when_the_next_begins(accelerator, monkeypatch):
    """What a graph is made of would lie in the memory that the next pass needs in one piece."""
    model, own, ends, alive = toy(), update.completion_logprobs, [], []

    def watched(*args):
        alive.append(sum(end() is not None for end in ends))
        logprobs, entropy = own(*args)
        end = Pass(None, None, None)  # held by the graph alone
        logprobs.grad_fn.register_hook(lambda *_, end=end: None)
        ends.append(weakref.ref(end))
        return logprobs, entropy

    monkeypatch.setattr(update, "completion_logprobs", watched)
    gradients(model, rollouts_from(model), accelerator, micro_batch_tokens=8, entropy_bonus=0.01)
    assert len(alive) > 3 and not any(alive)


@pytest.mark.parametrize("aggregation", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("kl_beta", [0.0, 0.1])
def test_micro_batches_change_nothing(aggregation, kl_beta, accelerator):
    model = toy()
    rollouts = rollouts_from(model)
    assert len(set(rollouts.completion_mask.sum(-1).flatten().tolist())) > 2  # unequal lengths
    reference = frozen_copy(toy(seed=1)) if kl_beta else None
    settings = {"aggregation": aggregation, "kl_beta": kl_beta, "reference": reference}
    whole, metrics = gradients(model, rollouts, accelerator, **settings)
    del metrics["tokens/padded"]
    for tokens in (1, 15, 30, 60):  # from a completion at a time to questions that share a pass
        parts, part_metrics = gradients(
            model, rollouts, accelerator, micro_batch_tokens=tokens, **settings
        )
        del part_metrics["tokens/padded"]  # the only thing that depends on it
        assert distance(parts, whole) < 1e-5
        assert part_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-7)


def test_the_gradient_is_clipped_and_its_norm_logged_from_before(accelerator):
    model = toy()
    rollouts = rollouts_from(model)
    whole, _ = gradients(model, rollouts, accelerator)
    clipped, metrics = gradients(model, rollouts, accelerator, max_grad_norm=norm_of(whole) / 10)
    assert metrics["grad_norm"] == pytest.approx(norm_of(whole), rel=1e-5)
    assert norm_of(clipped) == pytest.approx(norm_of(whole) / 10, rel=1e-4)
    untouched, _ = gradients(model, rollouts, accelerator, max_grad_norm=norm_of(whole) * 10)
    assert distance(untouched, whole) < 1e-5
    for tokens in (1, 30):  # it is the whole step's gradient that is clipped
        parts, part_metrics = gradients(
            model, rollouts, accelerator, max_grad_norm=norm_of(whole) / 10,
            micro_batch_tokens=tokens,
        )  # fmt: skip
        assert distance(parts, clipped) < 1e-5
        assert part_metrics["grad_norm"] == pytest.approx(norm_of(whole), rel=1e-5)


def test_flat_groups_have_no_gradient_and_leaving_them_out_changes_nothing(
    accelerator, monkeypatch
):
    model = toy()
    rollouts = rollouts_from(model)
    scored = []
    original = update.completion_logprobs

    def spy(model, batch, *rest):
        scored.extend(prompt.tolist() for prompt in batch.prompts)
        return original(model, batch, *rest)

    monkeypatch.setattr(update, "completion_logprobs", spy)
    without, _ = gradients(model, rollouts, accelerator)
    assert scored == [[5, 9, 3], [7, 7, 1, 3]]
    monkeypatch.setattr(sharding, "micro_batches", lambda prompts, lengths, budget, ids, pictures: [
        *micro_batches(prompts, rollouts.completion_mask.sum(-1).tolist(), 0)
    ])  # fmt: skip
    everything, _ = gradients(model, rollouts, accelerator)
    assert scored[2:] == [[5, 9, 3], [8, 8], [7, 7, 1, 3]]
    assert distance(without, everything) < 1e-5


@pytest.mark.parametrize("tokens", [0, 30])
@pytest.mark.parametrize("aggregation", ["grpo", "dapo"])
def test_skipped_flat_groups_lose_their_kl_and_nothing_else_changes(
    aggregation, tokens, accelerator
):
    """The gradient is that of all groups, less what the flat one has by its KL alone."""
    model = toy()
    rollouts = rollouts_from(model)
    flags = {
        "reference": frozen_copy(toy(seed=1)), "kl_beta": 0.1, "micro_batch_tokens": tokens,
        "aggregation": aggregation,
    }  # fmt: skip
    flat = (ADVANTAGES == 0).all(-1)
    assert flat.tolist() == [False, True, False]
    everything, metrics = gradients(model, rollouts, accelerator, **flags)
    skipping, fewer = gradients(model, rollouts, accelerator, skip_flat_groups=True, **flags)
    model.zero_grad()
    reference, mask = flags["reference"], rollouts.completion_mask
    logprobs = naive_logprobs(model, rollouts.prompt_ids[1], rollouts.completion_ids[1], 1.0)
    with torch.no_grad():
        ref = naive_logprobs(reference, rollouts.prompt_ids[1], rollouts.completion_ids[1], 1.0)
    gap = ref - logprobs
    kl = ((gap.exp() - gap - 1) * mask[1]).double()
    weights = token_weights(mask, aggregation)[1]
    (0.1 * kl * weights).sum().backward()
    kl_alone = [p.grad for p in model.parameters()]
    assert norm_of(kl_alone) > 1e-3
    assert distance(skipping, [a - b for a, b in zip(everything, kl_alone)]) < 1e-5
    of_flat, of_all = int(mask[flat].sum()), metrics["tokens/trained"]
    assert fewer["tokens/trained"] == of_all - of_flat > 0
    rest = metrics["kl"] * of_all - kl.sum().item()
    assert fewer["kl"] == pytest.approx(rest / (of_all - of_flat), rel=1e-5)


def test_a_step_of_flat_groups_alone_moves_nothing_when_they_are_skipped(accelerator):
    model = toy()
    rollouts = rollouts_from(model)
    flat, reference = torch.zeros_like(ADVANTAGES), frozen_copy(toy(seed=1))
    flags = {"advantages": flat, "reference": reference, "kl_beta": 0.1}
    kept, metrics = gradients(model, rollouts, accelerator, **flags)
    skipped, nothing = gradients(model, rollouts, accelerator, skip_flat_groups=True, **flags)
    assert norm_of(kept) > 0 == norm_of(skipped)
    assert metrics["kl"] > 0 and "kl" not in nothing  # of no token, there is none
    assert nothing["tokens/trained"] == nothing["loss"] == 0


def test_completions_that_are_not_chosen_have_no_part_in_the_update(accelerator):
    """Neither in the gradient nor in what it is averaged over."""
    model = toy()
    rollouts = rollouts_from(model)
    chosen = torch.tensor([[True, False, True, False], [False] * 4, [True, True, False, False]])
    flags = {"reference": frozen_copy(toy(seed=1)), "kl_beta": 0.1}
    actual, _ = gradients(model, rollouts, accelerator, chosen=chosen, **flags)
    smaller = dataclasses.replace(
        rollouts,
        prompt_ids=[rollouts.prompt_ids[q] for q in (0, 2)],
        **{
            name: getattr(rollouts, name)[chosen].view(2, 2, -1)
            for name in ("completion_ids", "completion_mask", "logprobs")
        },
        finished=rollouts.finished[chosen].view(2, 2),
    )
    expected, _ = gradients(
        model, smaller, accelerator, advantages=ADVANTAGES[chosen].view(2, 2), **flags
    )
    assert distance(actual, expected) < 1e-5


@pytest.mark.parametrize("aggregation", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("kl_beta", [0.0, 0.1])
def test_a_step_in_which_nothing_is_chosen_changes_nothing(aggregation, kl_beta, accelerator):
    model = toy()
    before = [p.clone() for p in model.parameters()]
    args = make_args(aggregation=aggregation, kl_beta=kl_beta, num_inner_epochs=2)
    optimizer, _ = make_optimizer(model, args)
    reference = frozen_copy(model) if kl_beta else None
    setup = make_setup(model, args, accelerator, reference=reference)
    nothing = torch.zeros(3, 4, dtype=torch.bool)
    metrics = update_policy(setup, optimizer, rollouts_from(model), ADVANTAGES, nothing)
    assert metrics["loss"] == metrics["grad_norm"] == metrics["skipped"] == 0
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


def test_no_advantage_at_all_leaves_the_policy_alone(accelerator):
    model = toy()
    before = [p.clone() for p in model.parameters()]
    optimizer, _ = make_optimizer(model, make_args())
    setup = make_setup(model, make_args(), accelerator)
    metrics = update_policy(setup, optimizer, rollouts_from(model), torch.zeros(3, 4))
    assert metrics["loss"] == metrics["grad_norm"] == metrics["skipped"] == 0
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


def test_the_first_pass_has_ratio_one_and_the_second_does_not(accelerator):
    def run(epochs):
        model = toy(torch.float32, attention_dropout=0.5)  # dropout must not act
        args = make_args(learning_rate=0.02, num_inner_epochs=epochs)
        optimizer, _ = make_optimizer(model, args)
        setup = make_setup(model, args, accelerator)
        return update_policy(setup, optimizer, rollouts_from(model), ADVANTAGES)

    first, both = run(1), run(2)
    assert first["mismatch"] < 1e-5 and both["mismatch"] < 1e-5
    assert first["clip_fraction"] == 0
    assert both["clip_fraction"] > 0


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_the_sampler_s_noise_clips_nothing_and_changes_no_gradient(ratio, accelerator):
    """bf16 kernels differ by some 0.02 nats per token, GSPO's bounds are 3e-4 wide."""
    model = toy()
    rollouts = rollouts_from(model)
    noise = 0.02 * torch.randn(rollouts.logprobs.shape, generator=torch.Generator().manual_seed(0))
    noisy = dataclasses.replace(rollouts, logprobs=rollouts.logprobs + noise)
    flags = {"ratio": ratio, "clip_epsilon": 3e-4, "clip_epsilon_high": 4e-4}
    expected, _ = gradients(model, rollouts, accelerator, **flags)
    actual, metrics = gradients(model, noisy, accelerator, **flags)
    assert metrics["clip_fraction"] == 0
    assert metrics["mismatch"] == pytest.approx(0.016, rel=0.3)  # the mean of a normal's size
    assert distance(actual, expected) < 1e-12


def test_inner_epochs_update_once_each_and_compare_with_the_policy_before_the_first(
    accelerator, monkeypatch
):
    model = toy()
    rollouts = rollouts_from(model)
    args = make_args(num_inner_epochs=3, learning_rate=0.01)
    optimizer, _ = make_optimizer(model, args)
    steps, logprobs, old = [], [], []
    original = update.grpo_loss
    optimizer.register_step_post_hook(lambda *_: steps.append(1))

    def spy(now, batch, *rest):
        logprobs.append(now.detach())
        old.append(batch.old_logprobs)
        return original(now, batch, *rest)

    monkeypatch.setattr(update, "grpo_loss", spy)
    metrics = update_policy(make_setup(model, args, accelerator), optimizer, rollouts, ADVANTAGES)
    assert len(steps) == len(logprobs) == 3
    assert old[0] is None and all(torch.equal(x, logprobs[0]) for x in old[1:])
    assert not torch.equal(logprobs[1], logprobs[0]) and not torch.equal(logprobs[2], logprobs[1])
    assert metrics["mismatch"] < 1e-5


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_step_that_is_not_finite_moves_neither_weights_nor_moments(poison, accelerator):
    model = toy()
    rollouts = rollouts_from(model)
    args = make_args(max_grad_norm=0.5)
    optimizer, _ = make_optimizer(model, args)

    def updated(advantages):
        setup = make_setup(model, args, accelerator)
        return update_policy(setup, optimizer, rollouts, advantages)

    assert updated(ADVANTAGES)["skipped"] == 0
    weights = [p.clone() for p in model.parameters()]
    moments = [t.clone() for state in optimizer.state.values() for t in state.values()]
    poisoned = ADVANTAGES.clone()
    poisoned[0, 0] = poison
    assert updated(poisoned)["skipped"] == 1
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights))
    after = [t for state in optimizer.state.values() for t in state.values()]
    assert all(torch.equal(a, b) for a, b in zip(after, moments))
    assert all(p.grad is None for p in model.parameters())
    assert updated(ADVANTAGES)["skipped"] == 0


def test_truncated_completions_are_masked_only_on_request(accelerator):
    model = toy()
    rollouts = rollouts_from(model)
    finished = rollouts.finished
    assert finished.any() and not finished.all()
    with_them, _ = gradients(model, rollouts, accelerator)
    masked, _ = gradients(model, rollouts, accelerator, mask_truncated=True)
    by_hand = torch.where(finished, ADVANTAGES, 0.0)  # grpo weights: the others keep theirs
    expected, _ = gradients(model, rollouts, accelerator, advantages=by_hand)
    assert distance(masked, expected) < 1e-5
    assert distance(with_them, expected) > 1e-2


def test_all_truncated_and_masked_gives_a_finite_loss_and_no_change(accelerator):
    model = toy()
    rollouts = rollouts_from(model, length=1)
    rollouts.finished.fill_(False)
    optimizer, _ = make_optimizer(model, make_args())
    setup = make_setup(model, make_args(mask_truncated=True), accelerator)
    metrics = update_policy(setup, optimizer, rollouts, ADVANTAGES)
    assert metrics["loss"] == 0 and metrics["skipped"] == 0


def test_the_sampled_ids_reach_the_model_unchanged(accelerator, monkeypatch):
    """ "a" then "b" as two tokens, where the tokenizer itself would write one: "ab"."""
    tokenizer = make_tokenizer()
    model = make_model(vocab_size=len(tokenizer), dtype=torch.float64)
    a, b, joined = tokenizer.convert_tokens_to_ids(["a", "b", "ab"])
    assert tokenizer("ab", add_special_tokens=False).input_ids == [joined]
    script = torch.tensor([a, b, tokenizer.eos_token_id])
    steps = iter(script)

    def scripted(logits, uniforms, *args, **kwargs):
        rows = len(uniforms)
        return next(steps).expand(rows), torch.full((rows,), -1.0, dtype=logits.dtype)

    monkeypatch.setattr("sampling.groups.sample_tokens", scripted)
    rollouts = sample_rollouts(model, tokenizer, [[65]], 2, 3, 1.0, seeds())
    assert rollouts.texts == [["ab", "ab"]]
    seen = []
    original = update.completion_logprobs

    def spy(model, batch, completion_ids, *rest):
        seen.append(completion_ids.tolist())
        return original(model, batch, completion_ids, *rest)

    monkeypatch.setattr(update, "completion_logprobs", spy)
    gradients(model, rollouts, accelerator, advantages=torch.tensor([[1.0, -1.0]]))
    assert seen == [[script.tolist()] * 2]


def test_every_tensor_is_made_on_the_model_s_device(accelerator):
    """With meta as default, a tensor made without a device cannot meet the model's on the CPU."""
    tokenizer = make_tokenizer()
    model = make_model(vocab_size=len(tokenizer))
    problem = Problem("1 + 1?", "2", "1 + 1 = 2")
    args = make_args(
        kl_beta=0.1, cold_start_steps=1, cold_start_learning_rate=1e-4, questions_per_step=1,
        top_k=5, top_p=0.9, min_p=0.01, eval_batch_size=4,
    )  # fmt: skip
    setup = make_setup(model, args, accelerator, tokenizer, reference=frozen_copy(model))
    problems = Problems([problem], 0)
    torch.set_default_device("meta")
    try:
        cold_start(setup, problems, chat_prompt, worked_ids)
        optimizer, _ = make_optimizer(model, args)
        rollouts = sample_groups(setup, problems.batch(0, 1), [0])
        rewards = score(rollouts, [problem], REWARD_FUNCTIONS)
        advantages = group_advantages(rewards.total)
        advantages[0, 0] = 1.0
        metrics = update_policy(setup, optimizer, rollouts, advantages)
        records = evaluate(setup, [problem])
    finally:
        torch.set_default_device(None)
    assert math.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
    assert summarize(records)["problems"] == 1


@pytest.mark.gpu
def test_a_step_on_the_gpu_under_bf16_autocast():
    """Sampling, reference and policy in bf16, weights and gradients in fp32."""
    accelerator = Accelerator(mixed_precision="bf16")
    model = toy(torch.float32).to(accelerator.device)
    reference = frozen_copy(model, torch.bfloat16)
    with accelerator.autocast():
        rollouts = sample_rollouts(
            model, Words(0), [[5, 9, 3], [8, 8], [7, 7, 1, 3]], 4, 40, 1.0, seeds()
        )
    assert rollouts.completion_ids.device.type == "cuda"
    args = make_args(kl_beta=0.1, micro_batch_tokens=40)
    optimizer, _ = make_optimizer(model, args)
    setup = make_setup(model, args, accelerator, reference=reference)
    metrics = update_policy(setup, optimizer, rollouts, ADVANTAGES)
    assert math.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
    assert metrics["mismatch"] < 0.05
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# --- with any objective ------------------------------------------------------------------------

UPDATES = [
    {"ratio": "sequence", "clip_epsilon": 0.05, "clip_epsilon_high": 0.05},
    {"clip": "cispo", "aggregation": "dapo"},
    {"tis_cap": 1.1},
    {"entropy_bonus": 0.05},
    {"ratio": "sequence", "clip": "cispo", "tis_cap": 1.1, "entropy_bonus": 0.05},
    {"clip": "sapo", "tis_cap": 1.5, "tis_form": "sequence_mask"},
    {"clip": "gmpo", "tis_cap": 1.1, "tis_floor": 0.9, "tis_form": "token_mask"},
]


@pytest.fixture(scope="module")
def off_policy():
    """A model and rollouts of another, whose log-probs are that one's: no ratio is 1."""
    return toy(seed=1, initializer_range=0.1), rollouts_from(toy(initializer_range=0.1))


@pytest.mark.parametrize("flags", UPDATES, ids=str)
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
    batch = Batch(rollouts.logprobs, ADVANTAGES, weights, ref, logprobs.detach())
    objective = objective_of(make_args(kl_beta=0.1, **flags))
    loss, _ = grpo_loss(logprobs, batch, objective, entropy)
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
    bonus = {"advantages": flat, "entropy_bonus": 0.1}
    with_bonus, _ = gradients(model, rollouts, accelerator, **bonus)
    assert max(gradient.abs().max() for gradient in with_bonus) > 0
    skipping, _ = gradients(model, rollouts, accelerator, skip_flat_groups=True, **bonus)
    assert distance(skipping, with_bonus) == 0


def test_the_correction_s_ratio_compares_with_the_first_epoch_and_its_weight_stays(
    off_policy, accelerator, monkeypatch
):
    """Epoch 1: ratio 1 though sampler and trainer differ. Later: against the trainer, not them."""
    _, rollouts = off_policy
    calls, original = [], update.grpo_loss

    def spy(logprobs, batch, *rest):
        loss, sums = original(logprobs, batch, *rest)
        calls.append((logprobs.detach(), batch.old_logprobs, sums))
        return loss, sums

    monkeypatch.setattr(update, "grpo_loss", spy)
    settings = {"tis_cap": 1.1, "num_inner_epochs": 2, "micro_batch_tokens": 30}
    moving = toy(seed=1, initializer_range=0.1)
    args = make_args(max_completion_length=10, **settings)
    optimizer, _ = make_optimizer(moving, args)
    setup = make_setup(moving, args, accelerator)
    metrics = update_policy(setup, optimizer, rollouts, ADVANTAGES)
    passes = len(calls) // 2
    assert passes > 1
    moved = 0.0
    for (first, before, sums), (second, known, later) in zip(calls[:passes], calls[passes:]):
        assert before is None  # in the first epoch they are those of the moment
        assert torch.equal(known, first)
        assert sums["clip_fraction"] == 0 and sums["mismatch"] > 0
        assert sums["tis_capped"] == later["tis_capped"]
        moved += (second - first).abs().max().item()
    assert moved > 0
    assert metrics["tis_capped"] > 0


@pytest.mark.parametrize("kl_beta", [0.0, 0.1])
def test_the_advantage_acts_on_the_most_uncertain_tokens_of_the_whole_step(
    kl_beta, off_policy, accelerator
):
    """Which these are depends on no cut, nor on whether flat groups take part for the KL's sake."""
    model, rollouts = off_policy
    reference = frozen_copy(toy(seed=2, initializer_range=0.1)) if kl_beta else None
    settings = {"kl_beta": kl_beta, "reference": reference, "temperature": 0.8}
    actual, _ = gradients(model, rollouts, accelerator, top_entropy=0.3, **settings)
    mask = rollouts.completion_mask
    logprobs, entropy = naive_logprobs_and_entropies(model, rollouts, 0.8)
    counted = entropy[mask & (ADVANTAGES != 0)[..., None]]
    acting = entropy >= counted.sort().values[-math.ceil(0.3 * len(counted))]
    weights = token_weights(mask, "grpo").double()
    loss = -(weights * (acting & mask) * ADVANTAGES[..., None] * logprobs).sum()  # at ratio 1
    if kl_beta:
        with torch.no_grad():
            gap, _ = naive_logprobs_and_entropies(reference, rollouts, 0.8)
        gap = gap - logprobs
        loss = loss + (weights * kl_beta * (gap.exp() - 1 - gap)).sum()
    assert distance(actual, torch.autograd.grad(loss, list(model.parameters()))) < 1e-5
    parts, _ = gradients(
        model, rollouts, accelerator, top_entropy=0.3, micro_batch_tokens=30, **settings
    )
    assert distance(parts, actual) < 1e-5
    everywhere, _ = gradients(model, rollouts, accelerator, **settings)
    assert distance(everywhere, actual) > 1e-2


def naive_logprobs_and_entropies(model, rollouts, temperature):
    """Both (Q, G, C), from one whole sequence at a time."""
    rows = [
        model(torch.cat([prompt, row])[None]).logits[0, len(prompt) - 1 : -1] / temperature
        for prompt, ids in zip(rollouts.prompt_ids, rollouts.completion_ids)
        for row in ids
    ]
    logprobs = torch.stack(rows).log_softmax(-1)  # (B, C, V)
    ids = rollouts.completion_ids.flatten(0, 1)[..., None]
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    shape = rollouts.completion_ids.shape
    return logprobs.gather(-1, ids).view(shape), entropy.detach().view(shape)


def test_towards_a_target_the_bonus_has_the_weight_that_the_step_s_entropy_asks_for(accelerator):
    model = toy(initializer_range=0.1)
    rollouts = rollouts_from(model)
    entropy = -(rollouts.logprobs.sum() / rollouts.completion_mask.sum()).item()
    for share in (0.25, 1.5):  # of the target; above it there is no bonus
        weight = 0.1 * max(0, 1 - share)
        expected, _ = gradients(model, rollouts, accelerator, entropy_bonus=weight)
        actual, metrics = gradients(
            model, rollouts, accelerator, entropy_bonus=0.1, entropy_target=entropy / share
        )
        assert metrics["entropy_bonus"] == pytest.approx(weight)
        assert distance(actual, expected) < 1e-5


# --- what it trained on ------------------------------------------------------------------------


def test_trained_are_those_with_an_advantage_and_with_a_kl_term_all():
    prompts, lengths = [torch.arange(7), torch.arange(2)], [[4, 1, 2], [3, 3, 5]]
    advantages = torch.tensor([1.0, -1.0, 0.0, 0.0, 0.5, -0.5])

    def passes(budget):
        for read in micro_batches(prompts, lengths, budget):
            weights = (torch.arange(6) < torch.tensor(read.lengths)[:, None]).float()
            batch = Batch(None, advantages[read.rows], weights)
            yield Pass(read, None, batch)

    # Prompts 7 and 2: 5 places without a token; completions: 6 x 5 - 18 = 12.
    assert trained_counts(passes(0), always=False) == {
        "tokens/trained": 4 + 1 + 3 + 5, "tokens/padded": 17, "completions/trained": 4,
    }  # fmt: skip
    assert trained_counts(passes(0), always=True)["tokens/trained"] == 18
    assert trained_counts(passes(1), always=False) == {
        "tokens/trained": 13, "tokens/padded": 0, "completions/trained": 4,
    }  # fmt: skip
    assert set(trained_counts([], always=False).values()) == {0}
