"""The demo's model that sees, made of a small language model, a random tower and the projector that
is shipped."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import TASK, make_model, make_tokenizer
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForImageTextToText

from llms import load_model, prompt_of
from rldatasets import Problem
from tasks.shapes import Scene
from training.sharding import saved_buffers
from utils import EMBEDDED_SIGHTED
from vision import embedded, lite0
from vision.sight import picture_of, save_reader

SCENE = Scene((("red", "circle"), None, None, ("blue", "star"), None, ("green", "square")), 1)
RANDOM = torch.Generator().manual_seed(0)


@pytest.fixture
def halves(tmp_path, monkeypatch):
    """A package with weights, here random ones, and a language model as wide as SmolLM2."""
    weights, folder = tmp_path / "lite0.pth", tmp_path / "text"
    tower = lite0.Lite0(lite0.Lite0Config())
    state = {
        name: torch.rand(value.shape, generator=RANDOM) if value.is_floating_point() else value
        for name, value in tower.state_dict().items()
        if name not in ("mean", "deviation")
    }
    torch.save(state | {"classifier": torch.ones(1)}, weights)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [embedded.PLACEHOLDER]})
    make_model("llama", vocab_size=len(tokenizer), hidden_size=576).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    monkeypatch.setattr(lite0, "weights_file", lambda: weights)
    monkeypatch.setattr(embedded, "embedded_folder", lambda: folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return state


def test_it_is_loaded_sees_and_is_saved_as_any_other(halves, tmp_path):
    model, tokenizer = load_model(EMBEDDED_SIGHTED, "cpu")
    tower = model.model.vision_tower
    loaded = [value for name, value in tower.state_dict().items() if name in halves]
    assert all(map(torch.equal, loaded, halves.values()))
    with safe_open(embedded.PROJECTOR, "pt") as shipped:
        for name, parameter in model.model.multi_modal_projector.named_parameters():
            assert torch.equal(parameter, shipped.get_tensor(name).float())
            assert not parameter.requires_grad
        assert torch.equal(tower.mean, shipped.get_tensor("mean").float())

    problem = Problem("What is red?", "circle", "", images=(SCENE,))
    prompt = prompt_of(tokenizer, TASK, problem)
    text = tokenizer.decode(prompt)
    assert text.count(embedded.PLACEHOLDER) == lite0.PLACES
    assert text.endswith(f"user\n{embedded.PLACEHOLDER * 16}What is red?<|im_end|>\n"
                         "<|im_start|>assistant\n")  # fmt: skip
    seen = picture_of(model, tokenizer, prompt, problem.images).features
    assert seen.shape == (lite0.PLACES, 576)

    model.save_pretrained(tmp_path / "saved")
    save_reader(tokenizer, tmp_path / "saved")
    assert len(saved_buffers(model)) > 2 * 49 and "model.vision_tower.mean" in saved_buffers(model)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    other, tokenizer = load_model(str(tmp_path / "saved"), "cpu")
    assert prompt_of(tokenizer, TASK, problem) == prompt
    assert torch.equal(picture_of(other, tokenizer, prompt, problem.images).features, seen)


def test_a_convolution_pads_as_tensorflow_does_and_a_batch_norm_follows():
    """With stride 2 the missing column is on the right, where torch would pad both sides."""
    layer = lite0.Convolution(1, 1, 3, stride=2, acts=False).eval()
    nn.init.ones_(layer.conv.weight)
    row = torch.arange(1.0, 5.0).expand(1, 1, 4, 4)  # 1 2 3 4, four times
    # Windows of columns 1-3 and 3-4, of three rows and of two.
    assert layer(row).flatten().tolist() == pytest.approx([18, 21, 12, 14], rel=1e-2)
    assert F.relu6(layer(row)).max() == 6


def test_the_shipped_projector_is_small_and_says_how_it_was_made():
    assert embedded.PROJECTOR.stat().st_size < 2e6
    with safe_open(embedded.PROJECTOR, "pt") as shipped:
        facts = shipped.metadata()
    assert json.loads(facts["flags"])["seed"] == 0
    last = json.loads(facts["log"])[-1]
    assert last["kind"] > 0.9 and last["colour"] > 0.85
