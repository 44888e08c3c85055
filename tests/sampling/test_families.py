"""Families of models: training and sampling against transformers' forward pass, or refused.

Texts are longer than the windows (8 tokens) and weights eight times what they start with, so that
whatever a family does differently shows. `FACTS=docs/models.md pytest -n 0` on this file writes the
table there.
"""

import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_args
from families import FAMILIES, SIZES, make_family
from toys import COMPLETIONS, Words, group_logprobs, naive, naive_logprobs, seeds
from transformers import AutoConfig, AutoModelForCausalLM

from llms import refuse_family
from sampling import probe as probing
from sampling.decoder import Decoder
from sampling.fallback import falls_back
from sampling.groups import sample_rollouts
from sampling.probe import TOLERANCE, load_policy, probe
from training.head import head_of
from training.lean_layers import recompute_layers
from training.logprobs import token_logprobs
from training.lora import add_adapter, trained_parameters
from utils import UserError

REFUSED = {
    "gpt-oss": "its attention asks for s_aux, which training does not do",
    "Qwen3.5": "its layers (linear_attention) would mix the sequences of a packed pass",
}
WORKING = [name for name in FAMILIES if name not in REFUSED]
FAST = {"Qwen2.5", "Qwen3", "LLaMA-3.2", "Mistral v0.3"}
PROMPTS = [[5, 9, 3, 1, 7, 7, 2, 30, 31, 4, 5, 6], [5, 9, 3], [8, 8, 1, 1, 2, 2, 3, 3, 4]]
PROMPT = torch.tensor(PROMPTS[0])


def differences(name, temperature=0.7):
    """The largest differences of the sampler and of the training pass, in nats per token, over
    texts of up to 24 tokens."""
    model, untouched = make_family(name), make_family(name)
    probe(model, "--model_name it")
    assert falls_back(model) == falls_back(untouched) == (name not in FAST)
    completions = torch.randint(64, (3, 12), generator=torch.Generator().manual_seed(1))
    completions[1, :5] = completions[0, :5]  # a shared prefix
    rollouts = sample_rollouts(model, Words(0), PROMPTS, 3, 12, temperature, seeds())
    sampling = max(
        ((rollouts.logprobs[q] - naive(untouched, rollouts, q, temperature))
        * rollouts.completion_mask[q]).abs().max().item()
        for q in range(3)
    )  # fmt: skip
    with torch.no_grad():
        expected = naive_logprobs(untouched, PROMPT, completions, temperature)
        training = (group_logprobs(model, PROMPT, completions, temperature) - expected).abs().max()
    assert expected.std() > 0.15  # far from uniform
    return sampling, training.item()


@pytest.mark.parametrize("name", WORKING)
def test_sampling_and_training_are_transformers_forward_pass(name):
    found = differences(name)
    assert max(found) < 1e-5, found
    write_down(name, "decoder" if name in FAST else "own layers", max(found))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused_by_name(name):
    model = make_family(name)
    with pytest.raises(UserError) as refusal:
        refuse_family(model.config, "--model_name it")
        probe(model, "--model_name it")
    line = str(refusal.value)
    assert f"--model_name it: model type {FAMILIES[name][0]}: {REFUSED[name]}" in line
    assert len(line) <= 200
    write_down(name, "refused", None)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("mamba", "its layers (linear_attention) would mix"),
        ("clip", "transformers has no causal language model"),
        ("llama4_text", "its layers (chunked_attention) see other tokens than those of a packed"),
        *((kind, "its attention does not go through transformers' interface") for kind in (
            "falcon", "bloom", "gptj", "codegen", "mpt", "gpt_neo", "xglm")),
    ],
)  # fmt: skip
def test_what_cannot_be_packed_is_refused_before_its_weights_are_read(kind, reason):
    with pytest.raises(UserError, match=f"--model_name it: model type {kind}: ") as refusal:
        refuse_family(AutoConfig.for_model(kind), "--model_name it")
    assert reason in str(refusal.value)


@pytest.mark.parametrize("kind", ["stablelm", "nemotron"])
def test_layers_that_do_not_hand_on_how_sequences_are_packed_are_refused_in_words(kind):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES))
    refuse_family(model.config, "--model_name it")
    with pytest.raises(UserError) as refusal:
        probe(model, "--model_name it")
    line = str(refusal.value)
    reason = "its layers do not hand on to attention how sequences are packed; not supported"
    assert line == f"--model_name it: model type {kind}: {reason}"


def test_a_model_that_fails_in_transformers_itself_is_refused_in_one_line(monkeypatch):
    model = make_family("Qwen3")
    monkeypatch.setattr(model, "forward", lambda *_, **__: torch.ones(3) + torch.ones(2))
    with pytest.raises(UserError) as refusal:
        probe(model, "--model_name it")
    line = str(refusal.value)
    assert line.startswith("--model_name it: model type qwen3: fails in transformers itself, mend")
    assert "The size of tensor a (3)" in line and "\n" not in line


def test_what_else_layers_fail_with_is_told_in_their_words(monkeypatch):
    def fails(*_):
        raise RuntimeError("no kernel\nfor it")

    monkeypatch.setattr(probing, "trained_logprobs", fails)
    with pytest.raises(UserError, match="its layers cannot read packed sequences: no kernel for"):
        probe(make_family("Qwen3"), "--model_name it")


def test_nine_of_ten_families_work():
    assert len(WORKING) >= 9 * len(FAMILIES) / 10


def write_down(name, how, difference):
    """This family's line of the table, where FACTS names the file that has it."""
    if "FACTS" in os.environ:
        file = Path(os.environ["FACTS"])
        figure = "" if difference is None else f"{difference:.1g}"
        line = f"| {name} | `{FAMILIES[name][0]}` | {how} | {figure} |"
        text = file.read_text(encoding="utf-8")
        file.write_text(re.sub(rf"^\| {re.escape(name)} \|.*$", line, text, flags=re.M))


@pytest.mark.parametrize("name", ["Mistral v0.1", "Gemma-2", "Granite 3.3", "Qwen3-MoE"])
def test_gradients_are_those_of_transformers_forward_pass(name):
    """With windows, softly capped scores and logits, scaled logits and experts; the same where the
    layers' inside is computed again."""
    expected, found, again = (make_family(name) for _ in range(3))
    weights = torch.randn(3, 5, generator=torch.Generator().manual_seed(2))
    prompt = torch.tensor(PROMPTS[2])
    recompute_layers(again)
    (naive_logprobs(expected, prompt, COMPLETIONS % 64, 0.7) * weights).sum().backward()
    for model in (found, again):
        (group_logprobs(model, prompt, COMPLETIONS % 64, 0.7) * weights).sum().backward()
        for (where, theirs), ours in zip(expected.named_parameters(), model.parameters()):
            assert (ours.grad - theirs.grad).norm() <= 1e-4 * theirs.grad.norm() + 1e-7, where


@pytest.mark.parametrize("name", ["GPT-2", "OLMo-2"])
def test_checkpointed_layers_sample_with_a_cache_and_drop_nothing_out(name):
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout"), 0.5)
    model = make_family(name, **dropout)
    recompute_layers(model)
    rollouts = sample_rollouts(model, Words(0), PROMPTS, 2, 6, 1.0, seeds())
    plain = make_family(name)
    for q in range(3):
        off = (rollouts.logprobs[q] - naive(plain, rollouts, q, 1.0)) * rollouts.completion_mask[q]
        assert off.abs().max() < 1e-5
    ids = COMPLETIONS % 64
    expected = naive_logprobs(plain, PROMPT, ids, 1.0)
    assert (group_logprobs(model, PROMPT, ids, 1.0) - expected).abs().max() < 1e-5


def test_a_capped_head_has_the_gradient_and_entropy_of_plain_autograd():
    model = make_family("Gemma-2").double()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 32, dtype=torch.float64, generator=generator).requires_grad_()
    ids = torch.randint(64, (7,), generator=generator)
    logits = 3.0 * torch.tanh(hidden @ head_of(model).weight.T / 3.0) / 0.7
    plain = logits.log_softmax(-1)
    entropy = -(plain.exp() * plain).sum(-1)
    values, entropies = token_logprobs(model, hidden, ids, 0.7, with_entropy=True)
    assert (values - plain.gather(-1, ids[:, None])[:, 0]).abs().max() < 1e-12
    assert (entropies - entropy).abs().max() < 1e-12
    inputs = (hidden, head_of(model).weight)
    for one, other in (
        (values.sum() + 0.3 * entropies.square().sum(),
         plain.gather(-1, ids[:, None]).sum() + 0.3 * entropy.square().sum()),
    ):  # fmt: skip
        for ours, theirs in zip(*(torch.autograd.grad(x, inputs) for x in (one, other))):
            assert (ours - theirs).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["Phi-3-mini", "Gemma-3", "Qwen3-MoE"])
def test_an_adapter_is_sampled_and_trained_as_peft_computes_it(name):
    targets = {"Phi-3-mini": ["qkv_proj", "gate_up_proj"]}.get(name, ["q_proj", "o_proj"])
    model, peers = make_family(name), make_family(name)
    for one in (model, peers):
        torch.manual_seed(3)
        add_adapter(one, make_args(lora_rank=4, lora_targets=targets))
        for parameter in trained_parameters(one):
            torch.nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        expected = naive_logprobs(peers, PROMPT, COMPLETIONS % 64, 0.7)
        found = group_logprobs(model, PROMPT, COMPLETIONS % 64, 0.7)
    assert (found - expected).abs().max() < 1e-5
    rollouts = sample_rollouts(model, Words(0), PROMPTS, 2, 4, 0.7, seeds())
    off = (rollouts.logprobs[0] - naive(peers, rollouts, 0, 0.7)) * rollouts.completion_mask[0]
    assert off.abs().max() < 1e-5


def test_layers_that_a_model_does_not_have_get_no_adapter_unsaid():
    with pytest.raises(UserError, match="no q_proj, up_proj; choose from o_proj, qkv_proj"):
        add_adapter(
            make_family("Phi-3-mini"),
            make_args(lora_rank=2, lora_targets=["q_proj", "o_proj", "up_proj"]),
        )


# --- the probe -----------------------------------------------------------------------------------


def test_a_decoder_that_differs_is_not_used(monkeypatch):
    """A family that is wrongly said to be written out: its own layers sample, and rightly so."""
    monkeypatch.setattr("sampling.fallback.WRITTEN_OUT", {"granite", "smollm3", "phi3"})
    for name in ("Granite 3.3", "SmolLM3", "Phi-4-mini"):  # differs, differs, cannot run
        model = make_family(name)
        assert not falls_back(model)
        assert max(probe(model, "--model_name it")) < 1e-5
        assert falls_back(model)


def test_a_training_pass_that_differs_is_refused_with_the_figure(monkeypatch):
    model = make_family("LLaMA-3.2")
    model.model.norm.forward = lambda x: x * (1 + x.shape[1] % 2)  # by the length of what is read
    with pytest.raises(UserError, match=r"the training pass is off by [\d.]+ nats per token"):
        probe(model, "--model_name it")


def test_own_layers_that_differ_with_a_cache_are_refused_with_the_figure(monkeypatch):
    zeros = torch.zeros(1, 64)
    monkeypatch.setattr(
        probing.OwnLayers, "step", lambda self, tokens: zeros.expand(len(tokens), -1)
    )
    with pytest.raises(UserError, match="reading with a cache is off by"):
        probe(make_family("Granite 3.3"), "--model_name it")


def test_windows_are_narrow_for_the_probe_alone(monkeypatch):
    model = make_family("Mistral v0.1", sliding_window=4096)
    monkeypatch.setattr("training.shared_prefix.narrowed", lambda bias, *_: bias)  # ignored
    with pytest.raises(UserError, match="training pass is off"):
        probe(model, "--model_name it")
    assert model.config.sliding_window == 4096


@pytest.mark.parametrize("seed", range(5))
def test_rounding_is_far_from_what_the_probe_refuses(seed):
    assert max(probe(make_family("Qwen3", seed=seed), "it")) < TOLERANCE / 100


def test_every_model_that_is_loaded_is_probed_and_what_needs_the_decoder_refused(monkeypatch):
    args = SimpleNamespace(model_name="it")  # as of `evaluate`, which has not the flags below
    accelerator = SimpleNamespace(device="cpu", is_fsdp2=False)
    monkeypatch.setattr(probing, "rendering_of", lambda args: None)
    monkeypatch.setattr(probing, "load_model", lambda *_: (make_family("OLMo-2"), None))
    assert falls_back(load_policy(args, accelerator)[0])
    with monkeypatch.context() as patch, pytest.raises(UserError, match="asks for s_aux"):
        patch.setattr(probing, "load_model", lambda *_: (make_family("gpt-oss"), None))
        load_policy(args, accelerator)
    for holder, name, value, flag in (
        (args, "sampler", "fused", "--sampler fused"),
        (args, "sampler", "paged", "--sampler paged"),
        (accelerator, "is_fsdp2", True, "FSDP2"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(holder, name, value, raising=False)
            with pytest.raises(UserError, match=f"{flag}: not for model type olmo2"):
                load_policy(args, accelerator)


def test_the_families_that_are_written_out_take_the_decoder(monkeypatch):
    made = []
    monkeypatch.setattr(Decoder, "__init__", lambda self, *_, **__: made.append(1) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample_rollouts(make_family("Qwen3"), Words(0), PROMPTS, 2, 3, 1.0, seeds())
    assert made
