"""How weights reach vLLM: a small stand-in for its side, tests/stub_vllm.py, takes them by the code
that runs in vLLM's workers. With vLLM itself: test_real_vllm.py."""

import json
import time
import types
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import make_args, make_model
from families import make_family
from safetensors.torch import load_file
from several import launch
from toys import engine_setup, without_layers
from transformers import AutoModelForCausalLM

from sampling import vllm_worker
from sampling import weights as weights_module
from sampling.engine import sample_rollouts_vllm
from sampling.weights import model_files, named_as_in_files
from training.lora import add_adapter
from training.processes import own_part
from training.sharding import local_tensor, shard
from utils import UserError

PROMPTS, SEEDS = [[5, 9, 3], [8, 2], [7, 7, 1, 3]], [11, 12, 13]


def moved(model):
    with torch.no_grad():
        for parameter in model.parameters():
            local_tensor(parameter).add_(0.05)


def texts_of(setup):
    """Of two draws, the second after an update."""
    found = []
    for _ in range(2):
        found.append(sample_rollouts_vllm(setup, PROMPTS, 3, SEEDS).texts)
        moved(setup.policy)
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_broadcast_brings_what_the_file_brings(precision, setup_with):
    def texts(way):
        torch.manual_seed(0)
        return texts_of(setup_with(without_layers(), vllm_transfer=way, precision=precision))

    assert texts("broadcast") == texts("file")


def test_of_a_policy_in_parts_the_whole_is_broadcast(python, tmp_path):
    def sampled(way):
        accelerator = Accelerator(cpu=True)
        setup = engine_setup(
            without_layers(), accelerator, python, output_dir=str(tmp_path), vllm_timeout=20.0,
            max_prompt_length=8, max_completion_length=12, vllm_transfer=way,
        )  # fmt: skip
        if accelerator.num_processes > 1:
            shard(setup.policy)
        own = [own_part(items, accelerator) for items in (PROMPTS, SEEDS)]
        moved(setup.policy)
        return sample_rollouts_vllm(setup, own[0], 3, own[1]).texts

    [expected] = launch(1, lambda: sampled("file"))
    first, second = launch(2, lambda: sampled("broadcast"))
    assert first + second == expected


@pytest.mark.parametrize("adapters", [False, True])
def test_what_goes_over_is_what_the_file_holds(adapters):
    model = make_family("Qwen3-MoE")  # whose experts transformers puts together
    args = make_args(precision="bf16", lora_rank=2, lora_targets=["q_proj", "v_proj"])
    if adapters:
        add_adapter(model, args)
        moved(model)
    with model_files(model, args) as folder:
        expected = load_file(f"{folder}/model.safetensors")
    assert {name for name in expected if "experts.1.up_proj" in name}
    found = named_as_in_files(model, args)
    assert {*found} == {*expected}
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_weight_s_handle_is_found_again_by_another_process(monkeypatch):
    """Without a GPU: with the arguments that torch would give of a tensor there."""
    tensor, opened = torch.arange(12.0).view(3, 4), []
    arguments = (
        torch.Tensor, tensor.shape, tensor.stride(), 0, torch.TypedStorage, torch.float32, 0,
        b"\x00handle\xff", 48, 512, False, b"counter", 3, b"event", True,
    )  # fmt: skip

    def rebuild(*given):
        opened.append(given)
        return torch._utils._rebuild_tensor(tensor._typed_storage(), given[3], *given[1:3])

    monkeypatch.setattr(weights_module, "reduce_tensor", lambda tensor: (None, arguments))
    monkeypatch.setattr("torch.multiprocessing.reductions.rebuild_cuda_tensor", rebuild)
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: opened.append(device))
    sent = json.loads(json.dumps([["a.weight", weights_module.handle(tensor)]]))
    loaded = {}
    worker = types.SimpleNamespace(
        device=torch.device("cuda", 5),
        reload_weights=lambda weights_iterator: loaded.update(weights_iterator),
    )
    vllm_worker.take_weights(worker, None, sent)
    assert torch.equal(loaded["a.weight"], tensor)
    expected = [*arguments]
    expected[1], expected[2], expected[6] = [3, 4], [4, 1], 5
    assert opened == [tuple(expected), worker.device]


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("ipc", "ipc: is for a GPU, and there is none; use file"),
        ("broadcast", "broadcast: one side is on a GPU and one is not; use file"),
    ],
)
def test_a_way_that_does_not_lead_there_is_one_line(way, message, setup_with, monkeypatch):
    monkeypatch.setenv("STUB_NAME", "GPU-1")
    with pytest.raises(UserError, match=f"^--vllm_transfer {message}"):
        setup_with(vllm_transfer=way)


@pytest.mark.parametrize("theirs", [["GPU-2"], ["GPU-1", "GPU-2"]])
def test_ipc_is_refused_where_the_engine_is_not_on_the_run_s_gpu_alone(theirs, monkeypatch):
    monkeypatch.setattr(weights_module, "device_name", lambda device: "GPU-1")
    engine = types.SimpleNamespace(ask=lambda what: theirs)
    with pytest.raises(UserError, match=r"^--vllm_transfer ipc: is for an engine on the run's own"):
        weights_module.way_to(engine, make_args(vllm_transfer="ipc"), torch.device("cuda"))


def test_nothing_is_broadcast_from_a_gpu_to_itself(monkeypatch):
    monkeypatch.setattr(weights_module, "device_name", lambda device: "GPU-1")
    engine = types.SimpleNamespace(ask=lambda what: ["GPU-2", "GPU-1"])
    with pytest.raises(UserError, match=r"^--vllm_transfer broadcast: NCCL does not lead from"):
        weights_module.way_to(engine, make_args(vllm_transfer="broadcast"), torch.device("cuda"))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("alone 0", "meet: ValueError: nobody there"),
        ("halfway 0", "weights: the engine ended with exit status 7"),
    ],
)
def test_an_engine_that_ends_in_the_middle_of_it_is_one_line(
    fault, message, setup_with, monkeypatch, capfd
):
    monkeypatch.setenv("STUB_FAULT", fault)
    with pytest.raises(UserError, match=f"^--sampler vllm: {message}"):
        sample_rollouts_vllm(setup_with(vllm_transfer="broadcast"), PROMPTS, 2, SEEDS)
    assert "Traceback" not in capfd.readouterr().err


def test_what_fails_on_our_side_is_what_is_told_and_at_once(setup_with, monkeypatch):
    def full(group, tensor):
        raise torch.OutOfMemoryError("no room for it")

    monkeypatch.setattr(weights_module, "broadcast", full)
    setup, began = setup_with(vllm_transfer="broadcast"), time.monotonic()
    aborted, [group] = [], setup.engine.groups
    setup.engine.groups[:] = [types.SimpleNamespace(abort=lambda: aborted.append(group))]
    with pytest.raises(UserError, match=r"^--sampler vllm: weights: OutOfMemoryError: no room for"):
        sample_rollouts_vllm(setup, PROMPTS, 2, SEEDS)
    assert time.monotonic() - began < 15 and setup.engine.process.poll() is not None
    assert aborted == [group]  # or a GPU would wait in it for good


def test_a_worker_whose_answer_is_not_heard_ends_where_it_fails(monkeypatch, capsys):
    def fails(weights_iterator):
        raise ValueError("no such name")

    worker = types.SimpleNamespace(rank=0, device=torch.device("cpu"), reload_weights=fails)
    with pytest.raises(ValueError, match="no such name"):
        vllm_worker.take_weights(worker, [], None)
    assert capsys.readouterr().err == ""
    ended = []
    monkeypatch.setattr("os._exit", ended.append)
    worker.rank = 1
    with pytest.raises(ValueError, match="no such name"):
        vllm_worker.take_weights(worker, [], None)
    assert ended == [1] and "no such name" in capsys.readouterr().err


def test_memory_that_others_cannot_open_is_refused(monkeypatch):
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setattr(weights_module, "device_name", lambda device: "GPU-1")
    engine = types.SimpleNamespace(ask=lambda what: ["GPU-1"])
    with pytest.raises(UserError, match=r"^--vllm_transfer ipc: PYTORCH_ALLOC_CONF has expandable"):
        weights_module.way_to(engine, make_args(vllm_transfer="ipc"), torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("way", ["ipc", "broadcast"])
def test_on_gpus_it_brings_what_the_file_brings(way, precision, setup_with, monkeypatch):
    if way == "broadcast" and torch.cuda.device_count() < 2:
        pytest.skip("one GPU: NCCL needs two")
    monkeypatch.setenv("STUB_DEVICE", "cuda:0" if way == "ipc" else "cuda:1")

    def texts(way):
        torch.manual_seed(0)
        model = without_layers().to("cuda:0")
        return texts_of(setup_with(model, vllm_transfer=way, precision=precision))

    assert texts(way) == texts("file")


@pytest.mark.gpu
def test_a_gpu_is_free_again_after_an_engine_ended_in_the_middle(setup_with, monkeypatch):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU: NCCL needs two")
    monkeypatch.setenv("STUB_DEVICE", "cuda:1")
    monkeypatch.setenv("STUB_FAULT", "halfway 0")
    setup = setup_with(without_layers().to("cuda:0"), vllm_transfer="broadcast")
    with pytest.raises(UserError, match="the engine ended with exit status 7"):
        sample_rollouts_vllm(setup, PROMPTS, 2, SEEDS)
    assert torch.isfinite(setup.policy.get_input_embeddings().weight.cpu()).all()


def test_weights_go_where_the_environment_says(setup_with, tmp_path, monkeypatch):
    (tmp_path / "seen by all").mkdir()
    monkeypatch.setenv(weights_module.FOLDER, str(tmp_path / "seen by all"))
    with model_files(without_layers(), make_args(precision="fp32")) as folder:
        assert Path(folder).parent == tmp_path / "seen by all"
    monkeypatch.setenv(weights_module.FOLDER, "nowhere")
    with pytest.raises(UserError, match=r"^GRPO_WEIGHTS_FOLDER=nowhere: no directory to write"):
        setup_with()


def test_files_for_the_engine_have_adapters_folded_in_and_leave_the_policy_alone():
    model, args = make_model(vocab_size=40), make_args(lora_rank=2, precision="fp32")
    add_adapter(model, args)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    before, ids = model.config.to_dict(), torch.arange(9)[None]
    with model_files(model, make_args(precision="bf16")):
        pass
    with model_files(model, args) as folder:
        files = {file.name for file in Path(folder).iterdir()}
        plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert "model.safetensors" in files and "adapter_config.json" not in files
    assert not Path(folder).exists()
    assert model.config.to_dict() == before
    assert (plain(ids).logits - model(ids).logits).abs().max() < 1e-5


@pytest.mark.parametrize("shared_has_room", [True, False])
def test_weights_go_through_shared_memory_where_there_is_room(
    shared_has_room, tmp_path, monkeypatch
):
    monkeypatch.setattr(weights_module, "SHARED", tmp_path)
    free = types.SimpleNamespace(free=10**9 if shared_has_room else 1000)
    monkeypatch.setattr(weights_module.shutil, "disk_usage", lambda path: free)
    with model_files(without_layers(), make_args(precision="fp32")) as folder:
        assert (Path(folder).parent == tmp_path) == shared_has_room
