"""Adapters: that they are peft's own, that nothing else learns, and what of them is written."""

import json
import math
import shutil
import signal
from dataclasses import replace
from importlib import util

import pytest
import torch
from conftest import FAMILIES, make_args, make_model, make_setup, make_tokenizer
from faults import INTERVAL, Toy, assert_same_run, lines, signal_in
from toys import (
    ADVANTAGES,
    COMPLETIONS,
    PROMPT,
    Words,
    distance,
    equal,
    generator,
    gradients,
    group_logprobs,
    move,
    naive,
    naive_logprobs,
    resuming,
    rollouts_from,
    saver_of,
    seeds,
)
from transformers import AutoModelForCausalLM

from evaluation.held_out import evaluate
from launch.checks import PEFT
from launch.parser import parse_args
from llms import chat_prompt, kl_reference, load_model
from records.checkpoints import checkpoint_to_resume
from rldatasets import Problem, Problems
from sampling.decoder import Decoder
from sampling.groups import sample_groups, sample_rollouts
from sampling.paged import engine_model
from sampling.turns import worked_ids
from training.cold_start import cold_start
from training.lora import (
    ADAPTER,
    add_adapter,
    save_adapter,
    settle_in_bfloat16,
    trained_parameters,
    whole_weight,
)
from training.optimizer import make_optimizer
from training.update import update_policy
from utils import UserError

LORA = {"lora_rank": 3, "lora_alpha": 6.0}


def with_lora(model, learnt=True, on_gpu=None, **overrides):
    """The model with an adapter that has learnt something, or with a fresh one."""
    add_adapter(model, make_args(**{**LORA, **overrides}), on_gpu)
    if learnt:
        torch.manual_seed(7)
        for parameter in trained_parameters(model):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def adapted(family="qwen2", dtype=torch.float64, **settings):
    return with_lora(make_model(family, dtype, vocab_size=40), **settings)


def scores(model):
    with torch.no_grad():
        return group_logprobs(model, PROMPT % 40, COMPLETIONS % 40, 1.0)


# --- the model with its adapter ------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_gradients_are_those_of_peft_s_own_forward_on_full_sequences(family):
    model = adapted(family)
    parameters, results = trained_parameters(model), []
    assert len(parameters) == 2 * 7 * 2  # A and B of seven layers in each of two blocks
    for function in (naive_logprobs, group_logprobs):  # the first before ours has changed anything
        model.zero_grad()
        logprobs = function(model, PROMPT % 40, COMPLETIONS % 40, 0.7)
        (logprobs * torch.arange(15.0).view(3, 5)).sum().backward()
        results.append((logprobs.detach(), [p.grad.clone() for p in parameters]))
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    (full, full_gradients), (shared, shared_gradients) = results
    assert (shared - full).abs().max() < 1e-12
    assert distance(shared_gradients, full_gradients) < 1e-5


def test_what_is_sampled_has_the_log_probs_of_the_model_with_its_adapter():
    """The sampler folds the adapter into its copy of the weights."""
    model, prompts = adapted(dtype=torch.float32), [[5, 9, 3], [8], [7, 7, 1, 30, 22, 4, 11]]

    def sampled(model):
        return sample_rollouts(model, Words(0), prompts, 4, 12, 0.7, seeds())

    rollouts = sampled(model)
    for question in range(3):
        error = naive(model, rollouts, question, 0.7) - rollouts.logprobs[question]
        assert error[rollouts.completion_mask[question]].abs().max() < 1e-4
    model.disable_adapters()
    base = sampled(model).logprobs
    assert torch.equal(base, sampled(make_model(vocab_size=40)).logprobs)
    assert not torch.equal(base[..., 0], rollouts.logprobs[..., 0])
    exact = adapted()
    logits, _ = Decoder(exact, 1, 1).prefill([(PROMPT % 40).tolist()])
    with torch.no_grad():
        assert (logits - exact(PROMPT[None] % 40).logits[0, -1]).abs().max() < 1e-11


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_a_folded_weight_does_what_the_layer_does(dtype, tolerance):
    layer = adapted(dtype=dtype).model.layers[0].self_attn.q_proj
    x = torch.randn(5, 32, dtype=dtype, generator=generator())
    folded = torch.nn.functional.linear(x, whole_weight(layer, dtype), layer.bias)
    assert (folded - layer(x)).abs().max() < tolerance
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    by_hand = layer.base_layer.weight + 6 / 3 * b @ a
    assert (whole_weight(layer, dtype) - by_hand).abs().max() < tolerance
    plain = layer.base_layer
    assert whole_weight(plain, dtype) is plain.weight


def test_folded_into_bf16_an_adapter_too_small_for_it_keeps_its_mean():
    model = adapted(dtype=torch.float32, learnt=False)
    layer, step = model.model.layers[0].mlp.gate_proj, 2**-7  # of bf16 from 1 on
    with torch.no_grad():
        layer.base_layer.weight.fill_(-1.0)
        assert torch.equal(whole_weight(layer, torch.bfloat16), layer.weight.bfloat16())
        layer.lora_A["default"].weight.fill_(1.0)
        layer.lora_B["default"].weight.fill_(-0.3 * step / 6)  # 3 ranks, scaled by 2
        whole = whole_weight(layer, torch.bfloat16)
        settled = make_model(vocab_size=40)
        settled.model.layers[0].mlp.gate_proj.weight.copy_(whole_weight(layer, torch.float32))
        settle_in_bfloat16(settled)
    assert set(whole.unique().tolist()) == {-1.0, -1.0 - step}
    assert (whole == -1 - step).float().mean().item() == pytest.approx(0.3, abs=0.04)  # of 1536
    assert torch.equal(settled.model.layers[0].mlp.gate_proj.weight, whole.float())
    weight = settled.model.layers[1].mlp.up_proj.weight
    assert torch.equal(weight, weight.bfloat16().float())


def test_the_other_engine_has_a_model_of_its_own_with_the_same_adapter():
    model = adapted(dtype=torch.float32)
    ids = torch.tensor([[5, 9, 3, 7]])
    with torch.no_grad():
        assert torch.equal(engine_model(model)(ids).logits, model(ids).logits)
    with torch.autocast("cpu", torch.bfloat16):
        engine_model(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


# --- the reference -------------------------------------------------------------------------------


def test_the_reference_is_the_model_itself_bit_for_bit_and_takes_no_memory_of_its_own():
    model = adapted(dtype=torch.float32, learnt=False)
    base = scores(make_model(vocab_size=40))
    reference = kl_reference(model, make_args(kl_beta=0.1))
    assert torch.equal(scores(model), base)  # B is 0
    for parameter in trained_parameters(model):
        torch.nn.init.normal_(parameter, std=0.1)
    assert not torch.allclose(scores(model), base, atol=1e-2)
    assert torch.equal(scores(reference), base)
    model.disable_adapters()
    assert torch.equal(scores(model), base)
    owned = {p.data_ptr() for p in model.parameters()}
    small = [p for p in reference.parameters() if p.data_ptr() not in owned]
    assert sum(p.numel() for p in small) == sum(p.numel() for p in trained_parameters(model))


def test_after_a_cold_start_the_reference_is_the_model_as_it_was_then():
    model = adapted(dtype=torch.float32)
    started = scores(model)
    reference = kl_reference(model, make_args(kl_beta=0.1, cold_start_steps=3))
    for parameter in trained_parameters(model):
        torch.nn.init.zeros_(parameter)
    assert torch.equal(scores(reference), started)
    assert torch.equal(scores(model), scores(make_model(vocab_size=40)))


def test_on_a_gpu_frozen_matrices_are_bf16_and_under_autocast_the_same():
    with torch.autocast("cpu", torch.bfloat16):
        whole, model = adapted(dtype=torch.float32), adapted(dtype=torch.float32, on_gpu=True)
        assert torch.equal(scores(model), scores(whole))
        reference = kl_reference(model, make_args(kl_beta=0.1, cold_start_steps=1), on_gpu=True)
        assert torch.equal(scores(reference), scores(whole))
        rollouts = sample_rollouts(model, Words(0), [[5, 9, 3]], 4, 9, 1.0, seeds())
        again = sample_rollouts(whole, Words(0), [[5, 9, 3]], 4, 9, 1.0, seeds())
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert {dtypes[name] for name in dtypes if ".base_layer.weight" in name} == {torch.bfloat16}
    rest = {dtypes[name] for name in dtypes if "lora" in name or "norm" in name or "embed" in name}
    assert rest == {torch.float32}
    assert (rollouts.logprobs[..., 0] - again.logprobs[..., 0]).abs().max() < 0.1


# --- learning ------------------------------------------------------------------------------------


def test_an_update_changes_the_adapter_alone_and_nothing_else_has_a_gradient(accelerator):
    model = with_lora(make_model(vocab_size=14), learnt=False)
    rollouts, args = rollouts_from(model), make_args(max_completion_length=10, kl_beta=0.1)
    reference = kl_reference(model, args)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer, _ = make_optimizer(model, args)
    setup = make_setup(model, args, accelerator, reference=reference)
    for _ in range(2):  # at the first, A has no gradient, for B is 0
        update_policy(setup, optimizer, rollouts, ADVANTAGES)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".lora_" in name)
        assert torch.equal(parameter, before[name]) == (".lora_" not in name), name
        assert parameter.grad is None
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert set(map(id, held)) == set(map(id, trained_parameters(model)))
    assert torch.equal(scores_of(reference, rollouts), scores_of(toy(), rollouts))


def toy():
    return make_model(vocab_size=14)


def scores_of(model, rollouts):
    with torch.no_grad():
        return group_logprobs(model, rollouts.prompt_ids[0], rollouts.completion_ids[0], 1.0)


def test_gradient_checkpointing_changes_no_gradient(accelerator):
    model = with_lora(make_model(vocab_size=14, dtype=torch.float64))
    rollouts = rollouts_from(model)
    flags = {"reference": kl_reference(model, make_args(kl_beta=0.1)), "kl_beta": 0.1}
    kept, _ = gradients(model, rollouts, accelerator, **flags)
    model.activation_checkpointing_enable()
    model.train()
    again, metrics = gradients(model, rollouts, accelerator, **flags)
    assert metrics["grad_norm"] > 0
    assert distance(again, kept) < 1e-6


def test_every_tensor_is_made_on_the_model_s_device(accelerator):
    """See the test of this name in test_update.py."""
    tokenizer = make_tokenizer()
    args = make_args(
        **LORA, kl_beta=0.1, cold_start_steps=1, cold_start_learning_rate=1e-4,
        questions_per_step=1, eval_batch_size=4,
    )  # fmt: skip
    model = with_lora(make_model(vocab_size=len(tokenizer)), learnt=False)
    setup = make_setup(model, args, accelerator, tokenizer)
    problem = Problem("1 + 1?", "2", "1 + 1 = 2")
    problems = Problems([problem], 0)
    torch.set_default_device("meta")
    try:
        cold_start(setup, problems, chat_prompt, worked_ids)
        setup = replace(setup, reference=kl_reference(model, args))
        optimizer, _ = make_optimizer(model, args)
        rollouts = sample_groups(setup, problems.batch(0, 1), [0])
        advantages = torch.tensor([[1.0, -1.0, 0.0, 0.0]], device="cpu")
        metrics = update_policy(setup, optimizer, rollouts, advantages)
        evaluate(setup, [problem])
    finally:
        torch.set_default_device(None)
    assert math.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0


# --- files ---------------------------------------------------------------------------------------


def test_a_checkpoint_is_the_adapter_its_moments_and_its_reference_and_no_weight(tmp_path):
    settings = {**LORA, "kl_beta": 0.1, "cold_start_steps": 1}

    def saver(start=None, seed=0):
        policy = with_lora(make_model())
        reference = kl_reference(policy, make_args(**settings))
        for model in (policy, reference):
            for parameter in trained_parameters(model):
                torch.nn.init.normal_(parameter, generator=generator(seed))
        return saver_of(tmp_path, policy, reference, start, kl_beta=0.1)

    first = saver()
    move(first)
    first.save()
    start = checkpoint_to_resume(resuming(tmp_path, kl_beta=0.1))
    again = saver(start, seed=1)
    assert equal(again.policy, first.policy) and equal(again.reference, first.reference)
    for either in (first, again):
        move(either)  # from the same moments
    assert equal(again.policy, first.policy)

    numbers = sum(p.numel() for p in trained_parameters(first.policy))
    sizes = {file.name: file.stat().st_size for file in start.path.iterdir()}
    for name, copies in ((ADAPTER, 1), ("reference.safetensors", 1), ("optimizer.pt", 2)):
        assert 0 <= sizes[name] - copies * 4 * numbers < 40_000  # names and headers
    assert not any("model-" in name or name in ("model.safetensors", "config.json")
                   for name in sizes)  # fmt: skip


def test_an_adapter_of_another_shape_is_refused(tmp_path):
    saver = saver_of(tmp_path, with_lora(make_model()))
    saver.completed(1)
    saver.save()
    start = checkpoint_to_resume(resuming(tmp_path))
    other = with_lora(make_model(), lora_rank=1)
    with pytest.raises(UserError, match=f"{ADAPTER} is of another adapter"):
        saver_of(tmp_path, other, start=start)


@pytest.fixture
def saved(saved_models, tmp_path):
    """A directory with an adapter of the saved Qwen2, and the model that it makes of it."""
    model, _ = load_model(str(saved_models["qwen2"]), "cpu")
    with_lora(model, model_name=str(saved_models["qwen2"]))
    (tmp_path / "one").mkdir()
    save_adapter(model, tmp_path / "one" / ADAPTER)
    return tmp_path / "one", model


def test_an_adapter_s_directory_loads_as_the_whole_model_and_may_stand_on_another(saved, tmp_path):
    folder, model = saved
    ids = torch.tensor([[5, 9, 3, 7]])
    merged, tokenizer = load_model(str(folder), "cpu")
    assert (merged(ids).logits - model(ids).logits).abs().max() < 1e-5
    assert len(tokenizer) == len(make_tokenizer())
    assert all(p.requires_grad for p in merged.parameters())
    plain = AutoModelForCausalLM.from_config(merged.config)
    assert [name for name, _ in merged.named_parameters()] == [
        name for name, _ in plain.named_parameters()
    ]
    with_lora(merged, model_name=str(folder))
    (tmp_path / "two").mkdir()
    save_adapter(merged, tmp_path / "two" / ADAPTER)
    assert json.loads((tmp_path / "two" / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == str(folder)
    twice, _ = load_model(str(tmp_path / "two"), "cpu")
    assert (twice(ids).logits - merged(ids).logits).abs().max() < 1e-5
    assert (twice(ids).logits - model(ids).logits).abs().max() > 1e-2


def test_saving_an_adapter_asks_no_hub(saved, monkeypatch, tmp_path):
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    _, model = saved
    model.peft_config["default"].base_model_name_or_path = "smollm2-135m"
    save_adapter(model, tmp_path / ADAPTER)


# --- the command line ----------------------------------------------------------------------------


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        parse_args(["--preset", "cpu", *map(str, argv)])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1 and len(line) <= 201
    return line


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--lora_rank", "4", "--update_ref_model", "--kl_beta", "0.1"], "--update_ref_model: "),
        (["--lora_alpha", "8"], "--lora_alpha: --lora_rank 0"),
        (["--lora_targets", "q_proj"], "--lora_targets: --lora_rank 0"),
        (["--merge_lora"], "--merge_lora: --lora_rank 0"),
        (["--lora_rank", "4", "--lora_targets", "query"], "'query' (choose from q_proj, k_proj"),
        (["--lora_rank", "-1"], "--lora_rank"),
        (["--lora_rank", "4", "--lora_alpha", "0"], "--lora_alpha"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(argv, reason, capsys):
    assert reason in refused(capsys, *argv).replace("'q_proj'", "q_proj").replace(
        "'k_proj'", "k_proj"
    )


def test_without_peft_one_line_says_how_to_install_it(saved, capsys, monkeypatch):
    folder, _ = saved
    spec = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "peft" else spec(name))
    install = f"run pip install --no-deps {PEFT}"
    assert install in refused(capsys, "--lora_rank", "8")
    assert install in refused(capsys, "--model_name", folder)


def test_a_directory_with_a_bad_adapter_is_refused(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved[0], "bad")
    config = json.loads((tmp_path / "bad" / "adapter_config.json").read_text())
    for base, reason in (
        ("nowhere/at/all", "--model_name bad, an adapter of nowhere/at/all: no such directory"),
        ("bad", "--model_name bad: its adapter_config.json is damaged or names no base model"),
        (None, "--model_name bad: its adapter_config.json is damaged or names no base model"),
    ):
        text = json.dumps({**config, "base_model_name_or_path": base})
        (tmp_path / "bad" / "adapter_config.json").write_text(text)
        assert reason in refused(capsys, "--model_name", "bad")
    (tmp_path / "bad" / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "bad" / ADAPTER).write_bytes(b"torn")
    with pytest.raises(UserError, match="--model_name bad: cannot be loaded"):
        load_model("bad", "cpu")
    (tmp_path / "bad" / ADAPTER).unlink()
    assert "no weights there" in refused(capsys, "--model_name", "bad")


# --- whole runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(saved_models, tmp_path_factory):
    toy = Toy(tmp_path_factory.mktemp("lora"), saved_models["qwen2"])
    toy.more = ("--lora_rank", "2", "--lora_targets", "q_proj", "down_proj", "--num_train_iters",
                "4")  # fmt: skip
    assert toy.run("straight", *toy.more).wait() == 0
    return toy


def test_a_run_that_was_stopped_goes_on_and_ends_like_one_that_was_not(runs):
    status, _, process = signal_in(
        runs, "stopped", "policy", signal.SIGTERM, call=7, delay=0.05, more=runs.more
    )
    assert status == 143, process.text()
    again = runs.run("stopped", *runs.more, "--resume")
    assert again.wait() == 0, again.text()
    assert again.resumed_at() % INTERVAL == 1
    assert_same_run(runs.path("stopped"), runs.path("straight"))


def test_the_model_of_a_run_is_an_adapter_and_with_merge_lora_a_whole_one(runs):
    run = runs.path("straight")
    metrics = lines(run / "metrics.jsonl")
    assert metrics[-1]["grad_norm"] > 0 and metrics[-1]["weights_changed"] > 0.9
    assert metrics[-1]["kl"] > 0
    merged, _ = load_model(str(run / "model"), "cpu")
    assert runs.run("straight", "--resume", *runs.more, "--merge_lora").wait() == 0
    assert not (run / "model" / ADAPTER).exists()
    assert equal(AutoModelForCausalLM.from_pretrained(run / "model"), merged)
