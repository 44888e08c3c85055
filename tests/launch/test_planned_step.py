"""One planned step against the same step with real tensors, parameter counts, and its work."""

import sys
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from conftest import FOUR_LAYERS, ROOT, make_model
from families import make_family
from toys import PARAMETERS, SMALL, planning
from transformers import AutoModelForCausalLM

from launch import planned_sampling, planned_step
from launch.fake_memory import Machine, Tracker, Work
from launch.known_models import KNOWN_MODELS
from launch.planned_step import as_if, config_of, planned
from utils import UserError
from vision.sight import class_of

sys.path.insert(0, str(ROOT / "benchmarks"))
from plan_vs_real import real_steps

ONE = Machine("all rates 1", {torch.float32: 1.0, torch.bfloat16: 1.0}, 1.0, 0.0, 0.0, False)

# --- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mixed_precision, extra",
    [
        ("no", []),
        pytest.param("no", ["--gradient_checkpointing"], marks=pytest.mark.slow),
        pytest.param(
            "no",
            ["--kl_beta", "0.04", "--micro_batch_tokens", "0", "--entropy_bonus", "0.01"],
            marks=pytest.mark.slow,
        ),
        pytest.param("bf16", ["--kl_beta", "0.04"], marks=pytest.mark.slow),
    ],
)
def test_every_phase_peaks_within_a_tenth_of_its_real_tensors(mixed_precision, extra, four_layers):
    _, folder = four_layers
    assert_real(planning("--model_name", folder, *SMALL, *extra), mixed_precision)


def test_so_does_every_phase_with_lora(four_layers):
    _, folder = four_layers
    extra = ["--kl_beta", "0.04", "--lora_rank", "4", "--questions_per_step", "1"]
    assert_real(planning("--model_name", folder, *SMALL, *extra), "bf16", layers=1)


def assert_real(args, mixed_precision, layers=4):
    plan = planned(args, on_gpu=mixed_precision == "bf16", layers=layers).peaks
    model = make_model(**{**FOUR_LAYERS, "num_hidden_layers": layers})
    assert_peaks(plan, model, args, mixed_precision)


def assert_peaks(plan, model, args, mixed_precision):
    update = max(plan[phase] for phase in plan if phase not in ("sampling", "evaluation"))
    tracker, accelerator = Tracker(), Accelerator(cpu=True, mixed_precision=mixed_precision)
    real_steps(model, args, accelerator, tracker)
    real = {phase: sum(parts.values()) for phase, parts in tracker.phases.items()}
    assert len(real) == 3
    for phase, peak in real.items():
        predicted = update if phase == "update" else plan[phase]
        assert predicted == pytest.approx(peak, rel=0.1), phase


@pytest.mark.slow
@pytest.mark.parametrize(
    "on_gpu, extra",
    [
        (True, ["--kl_beta", "0.04", "--gradient_checkpointing"]),
        (False, ["--lora_rank", "4", "--max_completion_length", "40"]),
    ],
)
def test_a_few_layers_tell_what_all_take_to_the_byte(on_gpu, extra, tmp_path):
    """Of every stretch: at full depth another one may be a phase's highest."""
    make_model(**{**FOUR_LAYERS, "num_hidden_layers": 6}).config.save_pretrained(tmp_path)
    args = planning("--model_name", str(tmp_path), *SMALL, *extra)
    told, full = planned(args, on_gpu, ONE), planned_step.planned_in_full(args, on_gpu, ONE, 6)
    assert told.stretches == full.stretches and told.peaks == full.peaks
    assert (told.parameters, told.trained, told.tokens) == (
        full.parameters, full.trained, full.tokens,
    )  # fmt: skip
    for phase, work in full.work.items():
        assert vars(told.work[phase]) == pytest.approx(vars(work), rel=1e-9), phase


@pytest.mark.slow
@pytest.mark.parametrize("name", ["OLMo-3", "Gemma-3"])
def test_so_does_every_phase_where_a_model_s_own_layers_sample(name, tmp_path):
    """With windows, by which some layers keep less."""
    wide = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 8}
    model = make_family(name, scale=1, vocab_size=500, **wide)
    model.config.save_pretrained(tmp_path)
    args = planning("--model_name", str(tmp_path), *SMALL, "--kl_beta", "0.04")
    plan = planned(args, on_gpu=False)
    assert plan.falls_back
    assert_peaks(plan.peaks, model, args, "no")


def test_what_reads_numbers_is_not_planned_and_named(tmp_path):
    make_family("Qwen3-MoE").config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="model type qwen3_moe: its layers cannot be planned"):
        planned(planning("--model_name", str(tmp_path), *SMALL), on_gpu=False)


@pytest.mark.slow
def test_smaller_micro_batches_and_checkpointing_plan_less_memory(four_layers):
    _, folder = four_layers
    peaks = [
        planned(planning("--model_name", folder, *SMALL, *extra), False).peaks["policy"]
        for extra in ([], ["--micro_batch_tokens", "90"], ["--gradient_checkpointing"])
    ]
    assert peaks[1] < peaks[0] and peaks[2] < peaks[0]


def test_parts_have_the_sizes_that_arithmetic_gives_them(four_layers):
    model, folder = four_layers
    long = [*SMALL, "--max_completion_length", "80"]  # past prefilling, where caches have no label
    phases = planned(planning("--model_name", folder, *long), False).phases
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
    args = planning("--model_name", folder, *SMALL, *flag)
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


def test_the_sampling_copy_is_in_the_precision_of_the_run(four_layers):
    """But for the head, which is never rounded. The reference is as well."""
    model, folder = four_layers
    parts = {}
    for precision in ("auto", "fp32", "bf16", "fp16"):
        args = planning(
            "--model_name", folder, *SMALL, "--kl_beta", "0.1", "--precision", precision
        )
        plan = planned(args, True, layers=1, phases=("sampling",))
        parts[precision] = plan.phases["sampling"]
    linear = sum(p.numel() for p in model.model.layers[0].parameters() if p.ndim == 2)
    biases = sum(p.numel() for n, p in model.model.layers[0].named_parameters() if "bias" in n)
    for part, halved in (("sampling copy", linear + biases), ("reference", linear + biases)):
        assert parts["fp32"][part] - parts["bf16"][part] == 2 * halved
    assert parts["auto"] == parts["bf16"] == parts["fp16"]


# --- models and work ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARAMETERS)
def test_known_models_have_the_published_number_of_parameters(name):
    with as_if(False):
        model = AutoModelForCausalLM.from_config(config_of(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_the_embedded_model_that_sees_is_the_other_one_with_a_projector_and_a_tower():
    with as_if(False):
        config = config_of("smollm2-135m+vision")
        model = class_of(config)._from_config(config).model
    parts = [sum(p.numel() for p in part.parameters())
             for part in (model.language_model, model.multi_modal_projector)]  # fmt: skip
    assert parts == [PARAMETERS["smollm2-135m"], (768 + 1) * 576 + (576 + 1) * 576]
    assert model.vision_tower.mean.shape == (768,)


def test_base_models_are_known_with_their_instruct_models():
    reading = [name for name, shape in KNOWN_MODELS.items() if "vision_config" not in shape]
    assert len(reading) == 2 * (len(PARAMETERS) - 1) + 1
    for name in PARAMETERS:
        assert KNOWN_MODELS[name.removesuffix("-Instruct")] == KNOWN_MODELS[name]


def test_work_is_that_of_the_formulas(four_layers):
    """2 per weight of a matrix and token read, the head where a token is predicted, thrice that
    with the backward pass, and attention on top, which is little here."""
    model, folder = four_layers
    whole = ["--model_name", folder, *SMALL, "--micro_batch_tokens", "0"]
    work = planned(planning(*whole), False, ONE).work
    head = model.get_output_embeddings().weight.numel()
    body = sum(p.numel() for p in model.get_decoder().layers.parameters() if p.ndim == 2)
    prompts, completions = 4 * 33, 24 * 12
    read = prompts + completions - 24
    assert work["policy"].flops == pytest.approx(6 * (body * read + head * completions), rel=0.15)
    sampled = 2 * body * (prompts + completions) + 2 * head * (4 + completions)
    assert work["sampling"].flops == pytest.approx(sampled, rel=0.15)
    policy = partial(planned, on_gpu=False, machine=ONE, phases=["policy"])
    epochs = policy(planning(*whole, "--num_inner_epochs", "3")).work["policy"].flops
    assert epochs == pytest.approx(3 * work["policy"].flops)
    # Once for all epochs, every pass goes forward to see which tokens are most uncertain.
    more = policy(planning(*whole, "--num_inner_epochs", "3", "--top_entropy", "0.2"))
    assert more.work["policy"].flops - epochs == pytest.approx(epochs / 9, rel=0.1)
    assert more.tokens["policy"] == 4 * read


@pytest.mark.slow
def test_on_a_gpu_a_token_is_a_graph_and_leaves_nothing_behind(four_layers):
    _, folder = four_layers
    args = planning("--model_name", folder, *SMALL, "--max_completion_length", "80")
    eager, graphs = (planned(args, on_gpu, ONE) for on_gpu in (False, True))
    assert graphs.work["sampling"].operations < 0.5 * eager.work["sampling"].operations
    assert graphs.phases["sampling"]["KV cache"] > 0 == graphs.phases["policy"]["KV cache"]
    assert graphs.phases["policy"]["sampling copy"] == 0


def test_a_token_on_average_reads_as_much_of_the_cache_as_it_does(four_layers):
    """Work is linear in that: here an average of steps at three lengths of the cache."""
    works = {128: Work(1.0, 10.0, 2), 300: Work(3.0, 30.0, 2)}
    assert planned_sampling.at_length(works, 214) == Work(2.0, 20.0, 2)
    assert planned_sampling.at_length({128: Work(1.0, 10.0, 2)}, 128) == Work(1.0, 10.0, 2)
    policy, _ = four_layers
    decoders = [
        planned_sampling.Decoder(policy, 2, 300),
        planned_sampling.GraphDecoder(policy, 2, 300, None),
    ]
    reads = [planned_sampling.average_read(decoder, 300) for decoder in decoders]
    assert reads == [150.5, pytest.approx((128 * 128 + 128 * 256 + 44 * 300) / 300)]


def test_rotary_embeddings_that_read_positions_can_be_planned(tmp_path, four_layers):
    """As what they are: on a GPU the host starts every kernel of theirs, for it reads positions."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    make_model(**FOUR_LAYERS, rope_parameters=rope).config.save_pretrained(tmp_path)
    dynamic, default = (planned(planning("--model_name", folder, *SMALL), True, ONE, layers=1)
                        for folder in (str(tmp_path), four_layers[1]))  # fmt: skip
    assert dynamic.phases["policy"] == default.phases["policy"]
    sampling = [plan.work["sampling"].operations for plan in (dynamic, default)]
    assert sampling[0] > 2 * sampling[1]
