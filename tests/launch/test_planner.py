"""The flags that make a run fit, what a plan may touch, and the page that it prints."""

import json
import os
import socket
import subprocess
import sys

import pytest
from conftest import ROOT
from toys import PARAMETERS, SMALL, planning
from transformers import AutoModelForCausalLM

from launch import planner
from launch.known_models import KNOWN_MODELS
from launch.planned_step import Plan, planned


class MadeUp(Plan):
    """A plan by a rule of what the phases in `stretches` take."""

    @property
    def peaks(self):
        return {phase: peak for phase, peak in self.all_peaks().items() if phase in self.stretches}

    def all_peaks(self):
        args = self.args
        fixed = 8e9 * (args.kl_beta > 0 and not args.lora_rank) + (4e9 if args.lora_rank else 20e9)
        policy = 2e6 * args.micro_batch_tokens * (0.5 if args.gradient_checkpointing else 1)
        return {"policy": fixed + policy, "evaluation": fixed + 50e6 * args.eval_batch_size}


@pytest.fixture
def made_up(monkeypatch):
    """What `fitting` finds by that rule."""

    def found(*argv, cards=(24, 40, 80)):
        def plans(args, on_gpu, phases=("policy", "evaluation")):
            return MadeUp(args, 0, 0, dict.fromkeys(phases), {}, {})

        monkeypatch.setattr(planner, "planned", plans)
        monkeypatch.setattr(planner, "needed", lambda peaks, on_gpu: max(peaks.values()))
        monkeypatch.setattr(planner, "CARDS", cards)
        return planner.fitting(plans(planning(*argv, preset="h100"), True), True)

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
    again = planning(*planner.as_flags(changed).split(), preset="h100")
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


def test_what_is_said_to_fit_takes_what_is_said(made_up):
    """Although each change plans but the phase that it is for."""
    for card, (changed, total) in made_up().items():
        args = planning(*planner.as_flags(changed).split(), preset="h100")
        peaks = MadeUp(args, 0, 0, {}, {}, {}).all_peaks()
        assert total == max(peaks.values()) <= card * 1e9


def test_where_weights_alone_are_too_much_no_flag_is_tried(monkeypatch):
    """Of a GPU of 24 GB, full fine-tuning of 1.5B parameters asks 28 for them and Adam alone."""
    tried = []

    def plans(args, on_gpu, phases=()):
        tried.append(bool(args.lora_rank))
        return MadeUp(args, 0, 0, {"policy": []}, {}, {})

    monkeypatch.setattr(planner, "planned", plans)
    first = MadeUp(planning(preset="h100"), 0, 0, dict.fromkeys(("policy", "optimizer")), {}, {})
    monkeypatch.setattr(MadeUp, "all_peaks", lambda self: {
        "policy": 10e9 if self.args.lora_rank else 36e9, "optimizer": 28e9,
    })  # fmt: skip
    found = planner.fitting(first, True)
    assert found[40][0] == {} and found[24][0] == {"lora_rank": 16} and tried == [True]


def test_the_default_fits_80_gb():
    """Qwen2.5-1.5B with the flags of the preset."""
    args = planning(preset="h100")
    peaks = planned(args, True).peaks
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
    monkeypatch.setattr("launch.checks.hub_file", refuse)
    planner.plan(planning(preset="h100"))
    text = capsys.readouterr().out
    parameters = 151936 * 1536 + 1536 + 2 * (1536 * (2 * 1536 + 512 + 3 * 8960 + 2) + 2048)
    assert f"{parameters:,} parameters" in text and "80 GB: fits as it is" in text
    weights = next(line for line in text.splitlines() if line.startswith("weights"))
    assert weights.split()[1:] == [f"{4 * parameters / 1e9:.2f}"] * 5
    assert len(text.splitlines()) <= 40 and max(map(len, text.splitlines())) <= 100
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
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
        planning("--model_name", "no-such-directory")
    assert stopped.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
