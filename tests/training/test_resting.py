"""A reference whose weights lie in a file between passes: the same numbers, less memory."""

import re
from pathlib import Path

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_model, save_model
from toys import gradients, rollouts_from, toy

from llms import frozen_copy
from training import resting
from training.resting import rest
from utils import release_freed_memory

KINDS = ("Anon", "File")


def wide_model():
    """Of more than a megabyte, tied, with weights in fp32 and some in bf16."""
    model = make_model(hidden_size=256, intermediate_size=1024, tie_word_embeddings=True)
    model.get_decoder().layers[0].to(torch.bfloat16)
    return model.requires_grad_(False)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def resident(kind):
    """Bytes that this process has in memory: "Anon" of its own, "File" of files wherever."""
    text = Path("/proc/self/status").read_text()
    kinds = ["Anon"] if kind == "Anon" else ["File", "Shmem"]
    return sum(int(re.search(rf"Rss{kind}:\s+(\d+)", text)[1]) for kind in kinds) * 1024


def test_a_model_that_rested_is_the_same(tmp_path):
    model = wide_model()
    before = state(model)
    for _ in range(2):
        rest(model, tmp_path)
        after = state(model)
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert {t.dtype for t in after.values()} == {torch.float32, torch.bfloat16}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not list(tmp_path.iterdir())  # the file has no name


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_its_memory_is_free_meanwhile(tmp_path):
    model = make_model(hidden_size=1024, intermediate_size=4096).requires_grad_(False)
    size, own, of_files = sum(p.nbytes for p in model.parameters()), *map(resident, KINDS)
    rest(model, tmp_path)
    release_freed_memory(model.device)
    assert own - resident("Anon") > 0.8 * size > 40e6
    assert resident("File") - of_files < 0.1 * size
    sum(p.sum() for p in model.parameters())  # read again, from the file
    assert own - resident("Anon") > 0.8 * size
    assert resident("File") - of_files > 0.8 * size
    rest(model, tmp_path)
    assert resident("File") - of_files < 0.1 * size


def test_a_model_that_rested_is_saved_and_loaded_as_any(tmp_path):
    model = wide_model()
    before = state(model)
    rest(model, tmp_path)
    save_model(model, tmp_path / "model.safetensors")
    other = wide_model()
    for parameter in other.parameters():
        parameter.zero_()
    load_model(other, tmp_path / "model.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(other).items())


def test_what_it_shares_stays_where_it_is(tmp_path):
    model, other = wide_model(), wide_model()
    shared = [*model.get_decoder().layers[1].parameters()]
    places = [p.data_ptr() for p in shared]
    own = model.get_input_embeddings().weight
    place = own.data_ptr()
    rest(model, tmp_path, [*shared, *other.parameters()])
    assert [p.data_ptr() for p in shared] == places
    assert own.data_ptr() != place


@pytest.mark.parametrize("when", ["it is written", "one looks"])
def test_no_room_for_the_file_leaves_the_model_in_memory(when, tmp_path, monkeypatch):
    def full(*args, **more):
        raise OSError(28, "No space left on device")

    if when == "it is written":
        monkeypatch.setattr(resting.tempfile, "TemporaryFile", full)
    else:
        monkeypatch.setattr(resting, "TO_SPARE", 10**9)
    model = wide_model()
    before, places = state(model), [p.data_ptr() for p in model.parameters()]
    for _ in range(2):
        rest(model, tmp_path)
    assert [p.data_ptr() for p in model.parameters()] == places
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())


@pytest.mark.parametrize("moves", [True, False])
def test_the_update_lets_a_reference_rest_that_does_not_move(moves, accelerator, monkeypatch):
    rested, model = [], toy()
    reference = frozen_copy(toy(seed=1))
    monkeypatch.setattr("training.update.rest", lambda model, *_: rested.append(model))
    gradients(model, rollouts_from(model), accelerator, reference=reference, kl_beta=0.1,
              update_ref_model=moves)  # fmt: skip
    assert rested == ([] if moves else [reference])


def test_an_update_with_a_reference_that_rested_has_the_same_gradient(
    accelerator, monkeypatch, tmp_path
):
    model, results = toy(), []
    rollouts = rollouts_from(model)
    for least in (2**20, 1):  # what is smaller does not rest
        monkeypatch.setattr(resting, "LEAST", least)
        reference = frozen_copy(toy(seed=1))
        for _ in range(2):
            results.append(
                gradients(model, rollouts, accelerator, reference=reference, kl_beta=0.1)[0]
            )
        assert (resting.MAPPED[reference] is not None) == (least == 1)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))
