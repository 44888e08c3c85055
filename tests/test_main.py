"""One update against naive references, the optimizer's recipe, and whole runs end to end."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import cold_start as cold_start_module
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, TASK, make_args, make_model, make_tokenizer
from test_llms import naive_logprobs
from test_sampler import Words, seeds
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluator
import main
from evaluation.comparison import summarize
from evaluation.held_out import evaluate
from launch.parser import parse_args
from llms import frozen_copy
from main import update_policy
from records.plots import Series
from records.rollout_file import load_rollouts
from records.run import show_progress
from rldatasets import Problem, Problems, arithmetic_problems
from sampling.groups import sample_rollouts
from training import sharding
from training.cold_start import cold_start, worked_ids
from training.optimizer import apply_gradients, make_optimizer
from training.shared_prefix import micro_batches
from utils import Stopwatch, UserError

ADVANTAGES = torch.tensor([[1.0, -1.0, 0.5, -0.5], [0.0, 0.0, 0.0, 0.0], [2.0, -1.0, -1.0, 0.0]])


def rollouts_from(model, temperature=1.0, seed=0, length=10):
    return sample_rollouts(
        model, Words(0), [[5, 9, 3], [8, 8], [7, 7, 1, 3]], 4, length, temperature, seeds(seed)
    )


def norm_of(gradients):
    return math.sqrt(sum(g.square().sum().item() for g in gradients))


def toy(dtype=torch.float64, **overrides):
    return make_model(dtype=dtype, vocab_size=14, **overrides)


class RecordingSGD(torch.optim.SGD):
    """Plain gradient descent at rate 0 that keeps the gradients it was given."""

    def __init__(self, model):
        super().__init__(model.parameters(), lr=0.0)

    def step(self, closure=None):
        self.seen = [
            torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for group in self.param_groups
            for p in group["params"]
        ]


def gradients(
    model, rollouts, accelerator, advantages=ADVANTAGES, reference=None, chosen=None, **flags
):
    optimizer = RecordingSGD(model)
    args = make_args(max_completion_length=10, **flags)
    metrics = update_policy(
        model, reference, optimizer, rollouts, advantages, args, accelerator, Stopwatch(), chosen
    )
    return optimizer.seen, metrics


def without_reference(model, optimizer, rollouts, advantages, args, accelerator):
    return update_policy(
        model, None, optimizer, rollouts, advantages, args, accelerator, Stopwatch()
    )


def distance(ours, theirs):
    """The largest relative difference among the parameters' gradients."""
    return max((a - b).norm() / b.norm().clamp(min=1e-12) for a, b in zip(ours, theirs)).item()


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
    original = main.completion_logprobs

    def spy(model, batch, completion_ids, temperature):
        scored.extend(prompt.tolist() for prompt in batch.prompts)
        return original(model, batch, completion_ids, temperature)

    monkeypatch.setattr(main, "completion_logprobs", spy)
    without, _ = gradients(model, rollouts, accelerator)
    assert scored == [[5, 9, 3], [7, 7, 1, 3]]
    monkeypatch.setattr(sharding, "micro_batches", lambda prompts, lengths, budget: [
        *micro_batches(prompts, rollouts.completion_mask.sum(-1).tolist(), 0)
    ])  # fmt: skip
    everything, _ = gradients(model, rollouts, accelerator)
    assert scored[2:] == [[5, 9, 3], [8, 8], [7, 7, 1, 3]]
    assert distance(without, everything) < 1e-5


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
    metrics = update_policy(
        model, frozen_copy(model) if kl_beta else None, optimizer, rollouts_from(model), ADVANTAGES,
        args, accelerator, Stopwatch(), torch.zeros(3, 4, dtype=torch.bool),
    )  # fmt: skip
    assert metrics["loss"] == metrics["grad_norm"] == metrics["skipped"] == 0
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


def test_no_advantage_at_all_leaves_the_policy_alone(accelerator):
    model = toy()
    before = [p.clone() for p in model.parameters()]
    optimizer, _ = make_optimizer(model, make_args())
    metrics = update_policy(
        model, None, optimizer, rollouts_from(model), torch.zeros(3, 4), make_args(), accelerator,
        Stopwatch(),
    )  # fmt: skip
    assert metrics["loss"] == metrics["grad_norm"] == metrics["skipped"] == 0
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


def test_the_first_pass_has_ratio_one_and_the_second_does_not(accelerator):
    model = toy(torch.float32, attention_dropout=0.5)  # dropout must not act
    rollouts = rollouts_from(model)
    args = make_args(learning_rate=0.02, num_inner_epochs=1)
    optimizer, _ = make_optimizer(model, args)
    arguments = (None, optimizer, rollouts, ADVANTAGES, args, accelerator, Stopwatch())
    first = update_policy(model, *arguments)
    assert first["mismatch"] < 1e-5
    assert first["clip_fraction"] == 0
    second = update_policy(model, *arguments)
    assert second["mismatch"] > 0.01
    assert second["clip_fraction"] > 0


def test_inner_epochs_update_once_each_on_the_same_completions(accelerator):
    def run(calls, epochs):
        model = toy()
        rollouts = rollouts_from(model)
        args = make_args(num_inner_epochs=epochs, learning_rate=0.01)
        optimizer, _ = make_optimizer(model, args)
        metrics = [
            without_reference(model, optimizer, rollouts, ADVANTAGES, args, accelerator)
            for _ in range(calls)
        ]
        return [p.detach() for p in model.parameters()], metrics

    at_once, [metrics] = run(1, 3)
    one_by_one, singles = run(3, 1)
    assert all(torch.equal(a, b) for a, b in zip(at_once, one_by_one))
    clip = sum(single["clip_fraction"] for single in singles) / 3
    assert metrics["clip_fraction"] == pytest.approx(clip)
    assert metrics["mismatch"] < 1e-5


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_step_that_is_not_finite_moves_neither_weights_nor_moments(poison, accelerator):
    model = toy()
    rollouts = rollouts_from(model)
    args = make_args(max_grad_norm=0.5)
    optimizer, _ = make_optimizer(model, args)

    def update(advantages):
        return without_reference(model, optimizer, rollouts, advantages, args, accelerator)

    assert update(ADVANTAGES)["skipped"] == 0
    weights = [p.clone() for p in model.parameters()]
    moments = [t.clone() for state in optimizer.state.values() for t in state.values()]
    poisoned = ADVANTAGES.clone()
    poisoned[0, 0] = poison
    assert update(poisoned)["skipped"] == 1
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights))
    after = [t for state in optimizer.state.values() for t in state.values()]
    assert all(torch.equal(a, b) for a, b in zip(after, moments))
    assert all(p.grad is None for p in model.parameters())
    assert update(ADVANTAGES)["skipped"] == 0


@pytest.mark.parametrize(
    ("loss", "gradient", "skipped"),
    [(1.0, 1.0, 0), (1.0, math.inf, 1), (1.0, math.nan, 1), (math.nan, 1.0, 1), (math.inf, 1.0, 1)],
)
def test_loss_and_gradient_must_both_be_finite(loss, gradient, skipped):
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.tensor([gradient, 1.0])
    optimizer = torch.optim.SGD([weight], lr=0.1)
    assert apply_gradients(optimizer, torch.tensor(loss), 1.0)[1] == skipped
    assert torch.equal(weight, torch.ones(2)) == bool(skipped)
    assert weight.grad is None


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
    args = make_args(mask_truncated=True)
    metrics = without_reference(model, optimizer, rollouts, ADVANTAGES, args, accelerator)
    assert metrics["loss"] == 0 and metrics["skipped"] == 0


def test_the_sampled_ids_reach_the_model_unchanged(accelerator, monkeypatch):
    """ "a" then "b" as two tokens, where the tokenizer itself would write one: "ab"."""
    tokenizer = make_tokenizer()
    model = make_model(vocab_size=len(tokenizer), dtype=torch.float64)
    a, b, joined = tokenizer.convert_tokens_to_ids(["a", "b", "ab"])
    assert tokenizer("ab", add_special_tokens=False).input_ids == [joined]
    script = torch.tensor([a, b, tokenizer.eos_token_id])
    steps = iter(script)

    def scripted(logits, *args, **kwargs):
        rows = logits.shape[0]
        return next(steps).expand(rows), torch.full((rows,), -1.0, dtype=logits.dtype)

    monkeypatch.setattr("sampler.sample_tokens", scripted)
    rollouts = sample_rollouts(model, tokenizer, [[65]], 2, 3, 1.0, seeds())
    assert rollouts.texts == [["ab", "ab"]]
    seen = []
    original = main.completion_logprobs

    def spy(model, batch, completion_ids, temperature):
        seen.append(completion_ids.tolist())
        return original(model, batch, completion_ids, temperature)

    monkeypatch.setattr(main, "completion_logprobs", spy)
    gradients(model, rollouts, accelerator, advantages=torch.tensor([[1.0, -1.0]]))
    assert seen == [[script.tolist()] * 2]


def test_every_tensor_is_made_on_the_model_s_device(accelerator):
    """With meta as default, a tensor made without a device cannot meet the model's on the CPU."""
    tokenizer = make_tokenizer()
    model = make_model(vocab_size=len(tokenizer))
    problem = Problem("1 + 1?", "2", "1 + 1 = 2")
    args = make_args(
        kl_beta=0.1, cold_start_steps=1, cold_start_learning_rate=1e-4, questions_per_step=1,
        group_size=4, sampling_batch_size=0, seed=0, top_k=5, top_p=0.9, min_p=0.01,
        sampler="shared_prefix", compile_sampler=False,
    )  # fmt: skip
    problems = Problems([problem], 0)
    reference = frozen_copy(model)
    torch.set_default_device("meta")
    try:
        cold_start(model, tokenizer, problems, args, accelerator, TASK)
        optimizer, _ = make_optimizer(model, args)
        drawn = problems.batch(0, 1)
        rollouts = main.sample_groups(model, tokenizer, drawn, [0], args, accelerator, TASK)
        rewards = evaluator.score(rollouts, [problem], evaluator.REWARD_FUNCTIONS)
        advantages = main.group_advantages(rewards.total)
        advantages[0, 0] = 1.0
        metrics = update_policy(
            model,
            reference,
            optimizer,
            rollouts,
            advantages,
            args,
            accelerator,
            Stopwatch(),
        )
        records = evaluate(model, tokenizer, [problem], 8, 4, TASK)
    finally:
        torch.set_default_device(None)
    assert math.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
    assert summarize(records)["problems"] == 1


def test_a_step_is_sampled_in_batches_of_whole_groups(accelerator, monkeypatch):
    tokenizer = make_tokenizer()
    model = make_model(vocab_size=len(tokenizer))
    problems = [Problem(f"{n}+{n}", str(2 * n), "") for n in range(5)]
    args = make_args(
        seed=3, group_size=4, sampling_batch_size=9, max_completion_length=6, top_k=0, top_p=1.0,
        min_p=0.0, sampler="shared_prefix", compile_sampler=False,
    )  # fmt: skip
    asked, sample = [], main.sample_rollouts
    monkeypatch.setattr(
        main, "sample_rollouts", lambda *inputs: asked.append(inputs[2]) or sample(*inputs)
    )
    rollouts = main.sample_groups(model, tokenizer, problems, range(5), args, accelerator, TASK)
    assert [len(prompts) for prompts in asked] == [2, 2, 1]
    prompts = [ids for prompts in asked for ids in prompts]
    assert [ids.tolist() for ids in rollouts.prompt_ids] == prompts
    assert len({tuple(map(tuple, texts)) for texts in rollouts.texts}) == 5  # no draw twice
    assert rollouts.completion_mask.shape[:2] == (5, 4)
    args.sampling_batch_size = 0
    assert main.sample_groups(
        model, tokenizer, problems, range(5), args, accelerator, TASK
    ).texts == (rollouts.texts)


def test_what_is_compiled_serves_all_batches_of_a_step(accelerator, monkeypatch):
    """torch.compile starts anew for a batch of another size."""
    tokenizer = make_tokenizer()
    asked = []
    monkeypatch.setattr(main, "sample_rollouts", lambda *inputs: asked.append(len(inputs[2])))
    monkeypatch.setattr(main, "joined_rollouts", len)
    args = make_args(
        seed=3, group_size=4, sampling_batch_size=9, top_k=0, top_p=1.0, min_p=0.0,
        sampler="shared_prefix", compile_sampler=True,
    )  # fmt: skip
    for questions, sizes in ((5, [1] * 5), (4, [2] * 2), (2, [2])):
        drawn = [Problem("1 + 1?", "2", "")] * questions
        main.sample_groups(None, tokenizer, drawn, range(questions), args, accelerator, TASK)
        assert asked == sizes
        asked.clear()


def test_every_draw_of_every_question_has_a_seed_of_its_own(accelerator, monkeypatch):
    seen = []
    real = main.sample_groups
    monkeypatch.setattr(
        main, "sample_groups", lambda *inputs: seen.extend(inputs[3]) or real(*inputs)
    )
    tokenizer = make_tokenizer()
    args = make_args(
        seed=3, group_size=2, questions_per_step=3, max_draws=2, sampling_batch_size=0, top_k=0,
        top_p=1.0, min_p=0.0, sampler="shared_prefix", compile_sampler=False, reward_weights={},
        reward_timeout=None, overlong_buffer=0, max_completion_length=2,
    )  # fmt: skip
    problems = Problems([Problem(f"{n}?", str(n), "") for n in range(5)], 0)
    run = SimpleNamespace(save_step=lambda *_: None)
    for step in range(2):
        main.draw_groups(
            make_model(vocab_size=len(tokenizer)), tokenizer, problems, step, run, args,
            accelerator, Stopwatch(), TASK,
        )  # fmt: skip
    assert len(seen) == len(set(seen)) == 12


# --- the optimizer's recipe --------------------------------------------------------------------


def test_weight_decay_acts_on_matrices_alone():
    model = make_model("qwen2")
    optimizer, _ = make_optimizer(model, make_args(weight_decay=0.3))
    decay = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        expected = 0.0 if name.endswith("bias") or "norm" in name else 0.3
        assert decay[id(parameter)] == expected, name


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("cosine", [0.25, 0.5, 0.75, 1.0, 1.0, 0.853553, 0.5, 0.146447]),
    ],
)
def test_the_learning_rate_warms_up_and_then_follows_its_schedule(schedule, expected):
    args = make_args(learning_rate=1.0, num_train_iters=8, warmup_percent=0.5, lr_schedule=schedule)
    optimizer, scheduler = make_optimizer(make_model(), args)
    rates = []
    for _ in range(8):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(expected, abs=1e-6)


def test_at_a_rate_of_1e_6_fp32_weights_move_and_bf16_ones_do_not(accelerator):
    def changed(dtype):
        model = make_model(dtype=dtype, vocab_size=14, initializer_range=0.02)
        start = [p.clone() for p in model.parameters() if p.ndim == 2]
        args = make_args(learning_rate=1e-6)
        optimizer, _ = make_optimizer(model, args)
        for step in range(10):
            rollouts = rollouts_from(model, seed=step)
            without_reference(model, optimizer, rollouts, ADVANTAGES, args, accelerator)
        now = [p for p in model.parameters() if p.ndim == 2]
        moved = sum((a != b).sum().item() for a, b in zip(now, start))
        return moved / sum(p.numel() for p in now)

    assert changed(torch.float32) > 0.99
    assert changed(torch.bfloat16) < 0.5


WORKED = "<reasoning>\n1 + 1 = 2\n</reasoning>\n<answer>\n2\n</answer>\n"


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_the_worked_answer_is_its_text_and_the_end_of_turn_and_nothing_else(family):
    tokenizer = make_tokenizer(family)
    _, ids = worked_ids(tokenizer, Problem("1 + 1?", "2", "1 + 1 = 2"), TASK)
    assert tokenizer.decode(ids) == WORKED + tokenizer.eos_token
    assert tokenizer.bos_token_id not in ids


def test_the_cold_start_s_loss_is_the_mean_over_all_target_tokens(accelerator, monkeypatch):
    """Questions and solutions of unequal length share one padded batch."""
    tokenizer = make_tokenizer()
    model = make_model(vocab_size=len(tokenizer), dtype=torch.float64)
    problems = [
        Problem("1 + 1?", "2", "1 + 1 = 2"),
        Problem("How much is 7?", "7", "It is 7.\nSo."),
    ]
    seen = {}

    def record(optimizer, loss, max_grad_norm):
        seen.update(loss=loss.item(), gradients=[p.grad.clone() for p in model.parameters()])
        optimizer.zero_grad()

    monkeypatch.setattr(cold_start_module, "apply_gradients", record)
    args = make_args(
        cold_start_steps=1, cold_start_learning_rate=1e-3, questions_per_step=2, max_grad_norm=1.0
    )
    cold_start(model, tokenizer, Problems(problems, 0), args, accelerator, TASK)
    logprobs = []
    for problem in problems:
        prompt, target = worked_ids(tokenizer, problem, TASK)
        logprobs.append(
            naive_logprobs(model, torch.tensor(prompt), torch.tensor([target]), 1.0).flatten()
        )
    loss = -torch.cat(logprobs).mean()
    loss.backward()
    assert seen["loss"] == pytest.approx(loss.item(), rel=1e-9)
    assert distance(seen["gradients"], [p.grad for p in model.parameters()]) < 1e-5


def test_the_cold_start_learns_the_worked_answer(accelerator):
    tokenizer = make_tokenizer()
    model = make_model(vocab_size=len(tokenizer), initializer_range=0.05)
    problem = Problem("1 + 1?", "2", "1 + 1 = 2")
    args = make_args(
        cold_start_steps=60, cold_start_learning_rate=1e-2, questions_per_step=1, max_grad_norm=1.0
    )
    cold_start(model, tokenizer, Problems([problem], 0), args, accelerator, TASK)
    [record] = evaluate(model, tokenizer, [problem], 80, 1, TASK)
    assert record["completion"] == WORKED
    assert summarize([record])["accuracy"] == 1.0


# --- whole runs --------------------------------------------------------------------------------

TINY = [
    "--preset", "cpu", "--questions_per_step", "2", "--group_size", "3", "--num_train_iters", "2",
    "--eval_problems", "5", "--max_completion_length", "12", "--max_prompt_length", "400",
    "--cold_start_steps", "1",
]  # fmt: skip


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_a_saved_model_trains_and_the_run_leaves_everything_behind(family, saved_models, tmp_path):
    run = tmp_path / "run"
    main.train(
        parse_args(
            [*TINY, "--model_name", str(saved_models[family]), "--output_dir", str(run), "--seed",
             "5", "--kl_beta", "0.04", "--update_ref_model", "--update_ref_model_freq", "1",
             "--eval_iterations", "1", "--save_steps", "2", "--num_inner_epochs", "2",
             "--warmup_percent", "0", "--learning_rate", "0.001", "--eval_samples", "2",
             "--save_rollouts", "--overlong_buffer", "6", "--weights_dtype", "bfloat16"]
        )
    )  # fmt: skip
    config = json.loads((run / "config.json").read_text())
    assert config["flags"]["seed"] == 5 and config["flags"]["kl_beta"] == 0.04
    assert config["packages"]["torch"] and config["device"] == "cpu"
    metrics = lines(run / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [0, 1]
    for key in ("reward", "rewards/correctness", "loss", "kl", "entropy", "grad_norm", "mismatch",
                "clip_fraction", "completion_length", "learning_rate", "tokens_per_second",
                "rewards/overlong", "weights_changed", "weights_changed_bf16", "tokens/sampled",
                "tokens/trained", "seconds/sampling", "seconds/reference",
                "seconds/policy"):  # fmt: skip
        assert math.isfinite(metrics[1][key]), key
    assert metrics[1]["alarms"] == []
    rates = [row["learning_rate"] for row in metrics]
    assert rates == pytest.approx([1e-3, 5e-4])  # cosine over two steps, whatever the epochs
    evaluations = lines(run / "eval.jsonl")
    assert [row["step"] for row in evaluations] == [0, 1, 2]
    assert all(row["problems"] == 5 and 0 <= row["pass@2"] <= 1 for row in evaluations)
    assert [row.get("mcnemar_p", "none yet") for row in evaluations] == ["none yet", 1.0, 1.0]
    held_out = [problem.question for problem in arithmetic_problems("test", 5)[:5]]
    for step in (0, 1, 2):
        answers = lines(run / "completions" / f"eval_{step:05d}.jsonl")
        assert [row["question"] for row in answers] == held_out
    rows = lines(run / "completions" / "step_00001.jsonl")
    assert len(rows) == 6
    assert {"question", "answer", "completion", "rewards", "reward", "advantage"} <= rows[0].keys()
    rollouts, rewards, advantages, chosen = load_rollouts(run / "rollouts/step_00001.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    completions = rollouts.completion_ids.flatten(0, 1), rollouts.completion_mask.flatten(0, 1)
    texts = [
        tokenizer.decode(ids[mask], skip_special_tokens=True) for ids, mask in zip(*completions)
    ]
    assert texts == [row["completion"] for row in rows]
    assert "assistant" in tokenizer.decode(rollouts.prompt_ids[1]) and len(rollouts.prompt_ids) == 2
    assert (rollouts.logprobs[rollouts.completion_mask] < 0).all() and chosen.all()
    assert rewards.total.flatten().tolist() == [row["reward"] for row in rows]
    assert rewards.per_function.flatten(0, 1).tolist() == [[*r["rewards"].values()] for r in rows]
    assert advantages.flatten().tolist() == [row["advantage"] for row in rows]
    tokens = lines(run / "completions" / "tokens_00001.jsonl")
    text = rows[tokens[0]["row"]]["completion"]
    assert len(tokens) == 3 and "".join(tokens[0]["tokens"]).startswith(text)
    assert "Held-out accuracy" in (run / "report.html").read_text()
    plots = {path.name for path in (run / "plots").iterdir()}
    assert {
        "overview.png",
        "budget.png",
        "reward.png",
        "rewards_correctness.png",
        "eval_accuracy.png",
    } <= plots
    for folder in ("model", "checkpoints/step_00002"):
        model = AutoModelForCausalLM.from_pretrained(run / folder)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    final = AutoModelForCausalLM.from_pretrained(run / "model")
    start = AutoModelForCausalLM.from_pretrained(saved_models[family])
    assert not torch.equal(final.model.embed_tokens.weight, start.model.embed_tokens.weight)
    assert AutoTokenizer.from_pretrained(run / "model").chat_template


def test_a_sixth_reward_needs_its_function_and_one_list_entry(
    saved_models, tmp_path, monkeypatch, capsys
):
    def brevity(completion, problem):
        return 1.0 if len(completion) < 10 else 0.25

    monkeypatch.setattr(evaluator, "REWARD_FUNCTIONS", [*evaluator.REWARD_FUNCTIONS, brevity])
    run = tmp_path / "run"
    main.train(
        parse_args([*TINY, "--model_name", str(saved_models["qwen2"]), "--output_dir", str(run),
                    "--reward_weights", "brevity=2"])
    )  # fmt: skip
    assert "warning: rewards: brevity earns 2 with the bare number" in capsys.readouterr().err
    first = lines(run / "metrics.jsonl")[0]
    assert first["rewards/brevity"] >= 0.25
    row = lines(run / "completions" / "step_00000.jsonl")[0]
    assert row["reward"] == pytest.approx(sum(row["rewards"].values()) + row["rewards"]["brevity"])
    assert "rewards/brevity" in lines(run / "eval.jsonl")[0]
    assert (run / "plots" / "rewards_brevity.png").exists()
    assert (run / "plots" / "eval_rewards_brevity.png").exists()


def test_the_checkpointing_flag_reaches_the_layers(saved_models, tmp_path, monkeypatch):
    def stop(policy, *_):
        assert policy.is_activation_checkpointing and policy.training
        raise InterruptedError

    monkeypatch.setattr(main, "cold_start", stop)
    argv = [*TINY, "--model_name", str(saved_models["llama"]), "--gradient_checkpointing",
            "--output_dir", str(tmp_path / "run")]  # fmt: skip
    with pytest.raises(InterruptedError):
        main.train(parse_args(argv))


def test_two_runs_of_one_seed_are_the_same_run(saved_models, tmp_path):
    weights = []
    for name in ("one", "two"):
        run = tmp_path / name
        main.train(
            parse_args(
                [*TINY, "--model_name", str(saved_models["qwen2"]), "--output_dir", str(run)]
            )
        )
        weights.append((run / "model" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--reward_weights", "corectness=2"], "--reward_weights corectness: no such reward"),
        (["--max_prompt_length", "20"], "--max_prompt_length 20: no training prompt"),
    ],
)
def test_what_only_the_files_can_tell_is_refused_before_anything_is_written(
    flags, reason, saved_models, tmp_path
):
    run = tmp_path / "run"
    argv = [*TINY, "--model_name", str(saved_models["qwen2"]), "--output_dir", str(run), *flags]
    with pytest.raises(UserError, match=reason):
        main.train(parse_args(argv))
    assert not run.exists()


def test_a_test_question_that_leaves_no_room_for_an_answer_is_refused(saved_models, tmp_path):
    for split, question in (("train", "1 + 1?"), ("test", "1 + 1? " * 160)):
        row = {"question": question, "answer": "So it is 2. #### 2"}
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row))
    argv = [*TINY, "--dataset_name", "gsm8k", "--dataset_path", str(tmp_path), "--output_dir",
            str(tmp_path / "run"), "--model_name", str(saved_models["qwen2"])]  # fmt: skip
    with pytest.raises(
        UserError, match=r"--max_completion_length 12: .* exceeds the model's context"
    ):
        main.train(parse_args(argv))
    assert not (tmp_path / "run").exists()


def test_over_long_training_questions_are_left_out_whole_and_counted(
    saved_models, tmp_path, capsys
):
    rows = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(6)]
    rows.append({"question": "long " * 100, "answer": "#### 1"})
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "test.jsonl").write_text(json.dumps(rows[0]))
    run = tmp_path / "run"
    argv = [*TINY, "--dataset_name", "gsm8k", "--dataset_path", str(tmp_path), "--output_dir",
            str(run), "--model_name", str(saved_models["qwen2"]), "--cold_start_steps", "0",
            "--num_train_iters", "4"]  # fmt: skip
    main.train(parse_args(argv))
    assert "1 of 7 training questions left out" in capsys.readouterr().out
    assert json.loads((run / "config.json").read_text())["left_out"] == 1
    asked = {
        row["question"]
        for step in range(4)  # 8 draws from 6 questions: the data is gone through again
        for row in lines(run / "completions" / f"step_{step:05d}.jsonl")
    }
    assert asked == {f"{i} + 1?" for i in range(6)}


def test_questions_are_drawn_until_enough_groups_carry_signal(saved_models, tmp_path, monkeypatch):
    """A reward that tells completions apart for odd numbers alone: half of the groups are flat."""
    rows = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(60)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    calls = iter(range(10**6))

    def alternating(completion, problem):
        return float(next(calls) % 2) if int(problem.answer) % 2 else 1.0

    monkeypatch.setattr(evaluator, "REWARD_FUNCTIONS", [alternating])
    run = tmp_path / "run"
    argv = [*TINY, "--dataset_name", "gsm8k", "--dataset_path", str(tmp_path), "--output_dir",
            str(run), "--model_name", str(saved_models["qwen2"]), "--cold_start_steps", "0",
            "--num_train_iters", "4", "--group_size", "4", "--max_draws", "6",
            "--train_group_size", "2"]  # fmt: skip
    main.train(parse_args(argv))
    metrics = lines(run / "metrics.jsonl")
    drawn, asked = [], []
    for step, row in enumerate(metrics):
        saved = lines(run / "completions" / f"step_{step:05d}.jsonl")
        drawn.append(len(saved) // 8)  # draws of two groups of four
        asked += [record["question"] for record in saved[::4]]
        groups = [saved[i : i + 4] for i in range(0, len(saved), 4)]
        trained = [group for group in groups if any(record["advantage"] for record in group)]
        signal = [group for group in groups if len({record["reward"] for record in group}) > 1]
        assert trained == signal[:2]
        assert all(sum(bool(r["advantage"]) for r in group) == 2 for group in trained)
        assert drawn[-1] == 6 or len(signal) >= 2
        assert row["flat_groups"] == pytest.approx(1 - len(signal) / len(groups))
        assert row["grad_norm"] > 0
    assert max(drawn) > 1
    assert len(asked) == len(set(asked))  # no step draws what another has drawn


@pytest.mark.parametrize("alarms", [[], ["truncated: too long", "kl: too far"]])
def test_a_step_s_alarms_are_printed_one_a_line(alarms, capsys):
    metrics = {"step": 3, "reward": 1.0, "kl": 0.1, "completion_length": 9.0,
               "tokens_per_second": 5.0, "alarms": alarms}  # fmt: skip
    bar = tqdm(total=5, file=sys.stderr)
    show_progress(bar, metrics, {"accuracy": 0.5}, None)
    written = capsys.readouterr().out
    assert written == "".join(f"step 3: alarm: {alarm}\n" for alarm in alarms)
    assert bar.n == 1


def test_a_cold_start_needs_worked_solutions(saved_models, tmp_path):
    data = tmp_path / "own.jsonl"
    rows = [{"question": f"{i} + 1?", "answer": i + 1} for i in range(30)]
    data.write_text("\n".join(map(json.dumps, rows)))
    argv = [*TINY, "--dataset_name", "gsm8k", "--dataset_path", str(data), "--output_dir",
            str(tmp_path / "run"), "--model_name", str(saved_models["qwen2"])]  # fmt: skip
    with pytest.raises(UserError, match="--cold_start_steps 1: the data has no worked solutions"):
        main.train(parse_args(argv))
    main.train(parse_args([*argv, "--cold_start_steps", "0"]))


def environment():
    return {**os.environ, "HF_TOKEN": "hf_canary1234567890", "HF_HUB_OFFLINE": "1"}


def test_ctrl_c_ends_a_run_in_one_line(saved_models, tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, ROOT / "main.py", *TINY, "--num_train_iters", "100000", "--model_name",
         saved_models["qwen2"], "--output_dir", run],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "interrupted" in errors.splitlines()[-1]
    assert Series(run).metrics["reward"]


def test_a_reward_function_that_fails_ends_the_run_with_its_name(
    saved_models, tmp_path, monkeypatch
):
    def unlucky(completion, problem):
        raise KeyError("surprise")

    monkeypatch.setattr(evaluator, "REWARD_FUNCTIONS", [unlucky])
    argv = [*TINY, "--model_name", str(saved_models["qwen2"]), "--output_dir"]
    with pytest.raises(UserError, match=r"unlucky raised KeyError.*completion"):
        main.train(parse_args([*argv, str(tmp_path / "one")]))
    # One that gets through the evaluation and fails in a step names the file of completions.
    monkeypatch.setattr(main, "evaluate_policy", lambda *a: ({"accuracy": 0.0, "problems": 1}, []))
    with pytest.raises(UserError, match=r"see .*step_00000.jsonl") as raised:
        main.train(parse_args([*argv, str(tmp_path / "two")]))
    assert Path(str(raised.value).split("see ")[1]).exists()


def test_the_real_command_trains_the_embedded_model(tmp_path):
    """SmolLM2-135M itself, through the command line: the demo with tiny numbers."""
    run = tmp_path / "demo"
    done = subprocess.run(
        [sys.executable, ROOT / "main.py", "--preset", "cpu", "--questions_per_step", "2",
         "--group_size", "2", "--num_train_iters", "1", "--cold_start_steps", "1",
         "--eval_problems", "4", "--max_completion_length", "6", "--output_dir", run],
        capture_output=True, text=True, env=environment(), timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "held-out, greedy" in done.stdout and "overview.png" in done.stdout
    for path in [path for path in run.rglob("*") if path.suffix in (".json", ".jsonl")]:
        assert "hf_canary" not in path.read_text(), path
    assert "hf_canary" not in done.stdout + done.stderr
    assert lines(run / "metrics.jsonl")[0]["mismatch"] < 1e-4
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert model.num_parameters() == 134_515_008
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


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
    metrics = update_policy(
        model,
        reference,
        optimizer,
        rollouts,
        ADVANTAGES,
        args,
        accelerator,
        Stopwatch(),
    )
    assert math.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
    assert metrics["mismatch"] < 0.05
    assert {p.dtype for p in model.parameters()} == {torch.float32}
