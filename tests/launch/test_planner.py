"""The plan against the same step with real tensors, parameter counts, what a plan may touch."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, make_model
from transformers import AutoModelForCausalLM

from launch import planner
from launch.fake_memory import Machine, Tracker, Work
from launch.known_models import KNOWN_MODELS
from launch.parser import parse_args
from launch.planned_step import as_if, config_of, planned
from launch.planner import quick_peaks

sys.path.insert(0, str(ROOT / "benchmarks"))
from plan_vs_real import real_steps

PARAMETERS = {  # as the models' cards and torchinfo count them
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "smollm2-135m": 134_515_008,
}
SMALL = [
    "--questions_per_step", "4", "--group_size", "6", "--max_prompt_length", "33",
    "--max_completion_length", "12", "--micro_batch_tokens", "180", "--eval_batch_size", "24",
]  # fmt: skip
FOUR_LAYERS = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 8,
    "head_dim": 16, "vocab_size": 500, "initializer_range": 0.02,
}  # fmt: skip


def flags(*argv, preset="cpu"):
    return parse_args(["--plan", "--preset", preset, *argv])


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory):
    """A Qwen2 and a directory that holds its configuration and nothing else."""
    folder = tmp_path_factory.mktemp("four_layers")
    model = make_model(**FOUR_LAYERS)
    model.config.save_pretrained(folder)
    return model, str(folder)


# --- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mixed_precision, extra",
    [
        ("no", []),
        ("no", ["--gradient_checkpointing"]),
        ("no", ["--kl_beta", "0.04", "--micro_batch_tokens", "0", "--entropy_bonus", "0.01"]),
        ("bf16", ["--kl_beta", "0.04"]),
    ],
)
def test_every_phase_peaks_within_a_tenth_of_its_real_tensors(mixed_precision, extra, four_layers):
    _, folder = four_layers
    assert_real(flags("--model_name", folder, *SMALL, *extra), mixed_precision)


def test_so_does_every_phase_with_lora(four_layers):
    _, folder = four_layers
    extra = ["--kl_beta", "0.04", "--lora_rank", "4", "--questions_per_step", "1"]
    assert_real(flags("--model_name", folder, *SMALL, *extra), "bf16", layers=1)


def assert_real(args, mixed_precision, layers=4):
    plan = planned(args, on_gpu=mixed_precision == "bf16", layers=layers).peaks
    update = max(plan[phase] for phase in plan if phase not in ("sampling", "evaluation"))
    tracker, accelerator = Tracker(), Accelerator(cpu=True, mixed_precision=mixed_precision)
    model = make_model(**{**FOUR_LAYERS, "num_hidden_layers": layers})
    real_steps(model, args, accelerator, tracker)
    real = {phase: sum(parts.values()) for phase, parts in tracker.phases.items()}
    assert len(real) == 3
    for phase, peak in real.items():
        predicted = update if phase == "update" else plan[phase]
        assert predicted == pytest.approx(peak, rel=0.1), phase


def test_a_tracker_counts_each_storage_once_and_until_it_is_freed():
    tracker = Tracker(vocab_size=7)
    with tracker, tracker.phase("all"):
        a = torch.zeros(10, 10)
        b = a.t()[1:].add_(1)  # a view
        c = (a @ a).relu()  # 400 bytes for the product, 400 for what is made of it
        logits = torch.zeros(2, 7)
        tracker.label([a], "weights")
        assert tracker.live == {"weights": 400, "activations": 400, "logits": 56}
        del a
        assert tracker.live["weights"] == 400  # the view still holds it
        del b, c, logits
    assert not any(tracker.live.values())
    assert sum(tracker.phases["all"].values()) == 1200


def test_smaller_micro_batches_and_checkpointing_plan_less_memory(four_layers):
    _, folder = four_layers
    peaks = [
        planned(flags("--model_name", folder, *SMALL, *extra), False).peaks["policy"]
        for extra in ([], ["--micro_batch_tokens", "90"], ["--gradient_checkpointing"])
    ]
    assert peaks[1] < peaks[0] and peaks[2] < peaks[0]


def test_peaks_at_full_depth_follow_from_two_and_three_layers(four_layers):
    _, folder = four_layers
    args = flags("--model_name", folder, *SMALL, "--gradient_checkpointing", "--kl_beta", "0.1")
    assert quick_peaks(args, True) == pytest.approx(planned(args, True).peaks, rel=0.02)


def test_parts_have_the_sizes_that_arithmetic_gives_them(four_layers):
    model, folder = four_layers
    long = [*SMALL, "--max_completion_length", "80"]  # past prefilling, where caches have no label
    phases = planned(flags("--model_name", folder, *long), False).phases
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert phases["policy"]["weights"] == weights
    assert phases["policy"]["gradients"] == weights
    assert phases["policy"]["Adam"] == pytest.approx(2 * weights, rel=1e-3)  # and step counts
    bytes_per_token = 4 * 2 * 4 * 2 * 16  # layers, keys and values, fp32, key-value heads, size
    assert phases["sampling"]["KV cache"] == bytes_per_token * (4 * 33 + 24 * 80)
    assert "reference" not in phases


def test_with_lora_gradients_moments_and_reference_are_the_adapter_s_alone(four_layers):
    model, folder = four_layers
    flag = ["--kl_beta", "0.04", "--lora_rank", "4", "--lora_targets", "q_proj", "down_proj"]
    args = flags("--model_name", folder, *SMALL, *flag)
    plan, on_gpu = (planned(args, on_gpu, layers=1) for on_gpu in (False, True))
    layer = list(model.model.layers[0].parameters())
    weights = sum(p.numel() for p in (*layer, model.lm_head.weight, model.model.norm.weight))
    adapter = 4 * (128 + 128 + 384 + 128)  # rank, in and out of both
    assert (plan.trained, plan.parameters) == (adapter, weights + adapter)
    parts = plan.phases["policy"]
    assert parts["weights"] == 4 * (weights + adapter)
    assert parts["gradients"] == 4 * adapter
    assert parts["reference"] == pytest.approx(4 * adapter, rel=0.01)  # and frequencies
    assert parts["Adam"] == pytest.approx(8 * adapter, rel=0.01)  # and step counts
    linear = sum(p.numel() for p in layer) - 2 * 128  # but for two norms
    assert on_gpu.phases["policy"]["weights"] == parts["weights"] - 2 * linear  # in bf16


# --- models and work ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARAMETERS)
def test_known_models_have_the_published_number_of_parameters(name):
    with as_if(False):
        model = AutoModelForCausalLM.from_config(config_of(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_base_models_are_known_with_their_instruct_models():
    assert len(KNOWN_MODELS) == 2 * (len(PARAMETERS) - 1) + 1
    for name in PARAMETERS:
        assert KNOWN_MODELS[name.removesuffix("-Instruct")] == KNOWN_MODELS[name]


ONE = Machine("all rates 1", {torch.float32: 1.0, torch.bfloat16: 1.0}, 1.0, 0.0, 0.0, False)


def test_work_is_that_of_the_formulas(four_layers):
    """2 per weight of a matrix and token read, the head where a token is predicted, thrice that
    with the backward pass, and attention on top, which is little here."""
    model, folder = four_layers
    whole = ["--model_name", folder, *SMALL, "--micro_batch_tokens", "0"]
    work = planned(flags(*whole), False, ONE).work
    head = model.get_output_embeddings().weight.numel()
    body = sum(p.numel() for p in model.get_decoder().layers.parameters() if p.ndim == 2)
    prompts, completions = 4 * 33, 24 * 12
    read = prompts + completions - 24
    assert work["policy"].flops == pytest.approx(6 * (body * read + head * completions), rel=0.15)
    sampled = 2 * body * (prompts + completions) + 2 * head * (4 + completions)
    assert work["sampling"].flops == pytest.approx(sampled, rel=0.15)
    epochs = planned(flags(*whole, "--num_inner_epochs", "3"), False, ONE).work
    assert epochs["policy"].flops == pytest.approx(3 * work["policy"].flops)


def test_an_operation_takes_as_long_as_its_arithmetic_or_its_bytes():
    tracker = Tracker(Machine("", {torch.float32: 10.0}, 1e9, 0.0, 0.5, True))
    with tracker:
        a = torch.ones(4, 4)
        before = tracker.work
        a @ a
        a.view(16)
        product = tracker.work - before
        a += 1
        addition = tracker.work - before - product
    assert (product.flops, product.operations) == (128, 1)
    assert product.seconds == pytest.approx(12.8)
    assert (addition.flops, addition.operations) == (0, 1)
    assert addition.seconds == pytest.approx(128e-9)
    assert product.predicted_seconds(tracker.machine) == pytest.approx(12.8)
    assert addition.predicted_seconds(tracker.machine) == 0.5  # the host is slower


def test_an_operation_takes_the_least_time_that_the_device_needs_for_any():
    tracker = Tracker(Machine("", {torch.float32: 10.0}, 1e9, 2.0, 0.0, True))
    with tracker:
        torch.ones(3) + 1
    assert tracker.work.seconds == 4.0


def test_what_a_graph_does_the_host_starts_at_once():
    tracker = Tracker(Machine("", {torch.float32: 1.0}, 1e9, 1.0, 0.0, True))
    with tracker:
        a = torch.ones(3) + 1
        with tracker.graph():
            for _ in range(5):
                a += 1
    assert (tracker.work.operations, tracker.work.seconds) == (3, 7)


def test_writing_into_a_cache_costs_what_is_written_and_not_the_cache():
    tracker = Tracker(Machine("", {}, 1.0, 0.0, 0.0, True))
    cache, new, now = torch.zeros(4, 100), torch.ones(4, 1), torch.zeros(1, dtype=torch.long)
    with tracker:
        cache.index_copy_(1, now, new)
    assert tracker.work.seconds == 2 * new.nbytes


def test_on_a_gpu_a_token_is_a_graph_and_leaves_nothing_behind(four_layers):
    _, folder = four_layers
    args = flags("--model_name", folder, *SMALL, "--max_completion_length", "80")
    eager, graphs = (planned(args, on_gpu, ONE) for on_gpu in (False, True))
    assert graphs.work["sampling"].operations < 0.5 * eager.work["sampling"].operations
    assert graphs.phases["sampling"]["KV cache"] > 0 == graphs.phases["policy"]["KV cache"]
    assert graphs.phases["policy"]["sampling copy"] == 0


def test_a_token_on_average_reads_as_much_of_the_cache_as_it_does(four_layers):
    """Work is linear in that: here an average of steps at three lengths of the cache."""
    works = {128: Work(1.0, 10.0, 2), 300: Work(3.0, 30.0, 2)}
    assert planner.at_length(works, 214) == Work(2.0, 20.0, 2)
    assert planner.at_length({128: Work(1.0, 10.0, 2)}, 128) == Work(1.0, 10.0, 2)
    policy, _ = four_layers
    decoders = [planner.Decoder(policy, 2, 300), planner.GraphDecoder(policy, 2, 300, None)]
    reads = [planner.average_read(decoder, 300) for decoder in decoders]
    assert reads == [150.5, pytest.approx((128 * 128 + 128 * 256 + 44 * 300) / 300)]


def test_rotary_embeddings_that_read_positions_can_be_planned(tmp_path, four_layers):
    """As what they are: on a GPU the host starts every kernel of theirs, for it reads positions."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    make_model(**FOUR_LAYERS, rope_parameters=rope).config.save_pretrained(tmp_path)
    dynamic, default = (planned(flags("--model_name", folder, *SMALL), True, ONE, layers=1)
                        for folder in (str(tmp_path), four_layers[1]))  # fmt: skip
    assert dynamic.phases["policy"] == default.phases["policy"]
    sampling = [plan.work["sampling"].operations for plan in (dynamic, default)]
    assert sampling[0] > 2 * sampling[1]


# --- the report and the command ----------------------------------------------------------------


class MadeUp(planner.Plan):
    """A plan by a rule of what phases take."""

    @property
    def peaks(self):
        args = self.args
        fixed = 8e9 * (args.kl_beta > 0 and not args.lora_rank) + (4e9 if args.lora_rank else 20e9)
        policy = 2e6 * args.micro_batch_tokens * (0.5 if args.gradient_checkpointing else 1)
        return {"policy": fixed + policy, "evaluation": fixed + 50e6 * args.eval_batch_size}


@pytest.fixture
def made_up(monkeypatch):
    """What `fitting` finds by that rule; quick peaks are `too_low` times those in full."""

    def found(*argv, cards=(24, 40, 80), too_low=1.0):
        def plans(args, on_gpu):
            return MadeUp(args, 0, 0, {}, {}, {})

        def quick(args, on_gpu):
            return {phase: too_low * peak for phase, peak in plans(args, on_gpu).peaks.items()}

        monkeypatch.setattr(planner, "planned", plans)
        monkeypatch.setattr(planner, "quick_peaks", quick)
        monkeypatch.setattr(planner, "needed", lambda peaks, on_gpu: max(peaks.values()))
        monkeypatch.setattr(planner, "CARDS", cards)
        return planner.fitting(plans(flags(*argv, preset="h100"), True), True)

    return found


LEAST = {"micro_batch_tokens": 2048, "eval_batch_size": 32, "gradient_checkpointing": True}


def test_flags_change_one_by_one_until_it_fits(made_up):
    found = made_up()
    assert list(found) == [24, 40, 80]
    assert found[80] == ({}, pytest.approx(44.4e9, rel=0.01))
    less = {"micro_batch_tokens": 4096, "eval_batch_size": 128}
    assert found[40] == (less, pytest.approx(36.2e9, rel=0.01))
    assert found[24] == ({"lora_rank": 16}, pytest.approx(20.4e9, rel=0.01))


def test_the_kl_is_given_up_last(made_up, monkeypatch):
    """It is part of the objective."""
    assert made_up("--kl_beta", "0.1", cards=(7, 80))[7][0].get("kl_beta") is None
    monkeypatch.setattr(planner, "can_use_lora", lambda args: False)
    changed, total = made_up()[24]
    assert (changed, total) == ({**LEAST, "kl_beta": 0.0}, pytest.approx(22.0e9, rel=0.01))
    again = flags(*planner.as_flags(changed).split(), preset="h100")
    assert again.gradient_checkpointing and again.kl_beta == 0 and again.eval_batch_size == 32
    assert made_up("--kl_beta", "0", cards=(8, 80))[8][0] is None


def test_lora_changes_no_more_than_it_has_to(made_up):
    found = made_up(cards=(7, 16, 80))
    few = {"lora_rank": 16, "micro_batch_tokens": 4096, "eval_batch_size": 128}
    assert found[16] == (few, pytest.approx(12.2e9, rel=0.01))
    assert found[7][0] == {**LEAST, "lora_rank": 16}


def test_where_nothing_is_enough_the_least_is_told(made_up):
    changed, least = made_up(cards=(2, 80))[2]
    assert changed is None and least == pytest.approx(6.05e9, rel=0.01)
    assert made_up("--update_ref_model", cards=(8, 80))[8][0] is None  # and not with LoRA
    with_kl = made_up("--update_ref_model", cards=(24, 80))[24]
    assert with_kl == (None, pytest.approx(29.6e9, rel=0.02))


def test_what_is_said_to_fit_was_planned_in_full(made_up):
    for card, (changed, total) in made_up(too_low=0.8).items():
        args = flags(*planner.as_flags(changed).split(), preset="h100")
        assert total == max(MadeUp(args, 0, 0, {}, {}, {}).peaks.values()) <= card * 1e9


def test_the_default_fits_80_gb():
    """Qwen2.5-1.5B with the flags of the preset."""
    args = flags(preset="h100")
    peaks = quick_peaks(args, True)
    held = 4 * PARAMETERS[args.model_name] * 4  # weights, gradients and Adam in fp32
    assert held < peaks["optimizer"] < peaks["policy"]
    assert planner.needed(peaks, True) < 80e9


def test_a_plan_touches_nothing_and_is_a_page_to_read(tmp_path, monkeypatch, capsys):
    """No network, no weights, no file. The model has fewer layers here, for time."""

    def refuse(*args, **kwargs):
        raise AssertionError("a plan must not do this")

    shallow = {**KNOWN_MODELS["Qwen/Qwen2.5-1.5B-Instruct"], "num_hidden_layers": 2}
    monkeypatch.setitem(KNOWN_MODELS, "Qwen/Qwen2.5-1.5B-Instruct", shallow)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr("flags.hub_file", refuse)
    planner.plan(flags(preset="h100"))
    text = capsys.readouterr().out
    parameters = 151936 * 1536 + 1536 + 2 * (1536 * (2 * 1536 + 512 + 3 * 8960 + 2) + 2048)
    assert f"{parameters:,} parameters" in text and "80 GB: fits as it is" in text
    weights = next(line for line in text.splitlines() if line.startswith("weights"))
    assert weights.split()[1:] == [f"{4 * parameters / 1e9:.2f}"] * 5
    assert len(text.splitlines()) <= 40 and max(map(len, text.splitlines())) <= 100
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_a_plan_without_the_hub(four_layers, tmp_path):
    _, folder = four_layers
    result = subprocess.run(
        [sys.executable, str(ROOT / "main.py"), "--plan", "--model_name", folder, *SMALL],
        capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0 and result.stderr == ""
    assert "peak memory, GB" in result.stdout and "predicted and not measured" in result.stdout
    assert list(tmp_path.iterdir()) == []
    assert json.loads((tmp_path / folder / "config.json").read_text())["num_hidden_layers"] == 4


def test_a_model_that_is_not_known_is_an_error_of_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        flags("--model_name", "no-such-directory")
    assert stopped.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
