"""--sampler vllm against a small stand-in for vLLM's side, tests/stub_vllm.py, which has a numpy
model of its own. With vLLM itself: test_real_vllm.py."""

import json
import os
import sys
import types
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from conftest import make_tokenizer
from several import launch
from toys import (
    asked_of,
    assert_stops_end_completions,
    engine_setup,
    flags_of,
    naive,
    without_layers,
)

from launch.parser import parse_args
from sampling import engine as engine_module
from sampling.engine import sample_rollouts_vllm
from sampling.vllm_worker import Worker
from training.processes import own_part
from training.sharding import local_tensor, shard
from utils import UserError, read_jsonl

PROMPTS, SEEDS = [[5, 9, 3], [8, 2], [7, 7, 1, 3]], [11, 12, 13]


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_what_comes_back_is_the_policy_s_at_the_sampling_temperature(setup_with, temperature):
    model = without_layers(tie_word_embeddings=temperature > 1, initializer_range=0.1)
    setup = setup_with(model, temperature=temperature)
    for _ in range(2):
        rollouts = sample_rollouts_vllm(setup, PROMPTS, 4, SEEDS)
        assert [ids.tolist() for ids in rollouts.prompt_ids] == PROMPTS
        for question in range(3):
            error = naive(model, rollouts, question, temperature) - rollouts.logprobs[question]
            assert error[rollouts.completion_mask[question]].abs().max() < 1e-4
        with torch.no_grad():  # the next ones are of the policy as it is then
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)


def test_masks_end_with_the_first_of_either_stop_token(setup_with):
    model = without_layers(vocab_size=10, initializer_range=0.1)
    model.generation_config.eos_token_id = [1]
    rollouts = sample_rollouts_vllm(setup_with(model), [[0, 5, 0], [1, 4]], 32, SEEDS)
    assert_stops_end_completions(rollouts, 12)
    assert (rollouts.logprobs[~rollouts.completion_mask] == 0).all()


def test_a_completion_depends_on_its_seed_alone(setup_with):
    setup = setup_with()
    first, again = (sample_rollouts_vllm(setup, PROMPTS, 4, SEEDS) for _ in range(2))
    alone = sample_rollouts_vllm(setup, PROMPTS[1:2], 4, SEEDS[1:2])
    assert torch.equal(first.completion_ids, again.completion_ids)
    assert alone.texts[0] == first.texts[1]
    assert len({text for group in first.texts for text in group}) > 9


def test_every_process_gets_the_completions_of_its_own_prompts(setup_with, monkeypatch):
    class Second:
        process_index = 1

        def __getattr__(self, name):
            return getattr(setup.accelerator, name)

    setup = setup_with()
    everyone = sample_rollouts_vllm(setup, PROMPTS, 4, SEEDS)
    other = [*zip(PROMPTS[:1], SEEDS)]
    monkeypatch.setattr(engine_module, "everyones", lambda part, _: [other, part])
    second = replace(setup, accelerator=Second())
    own = sample_rollouts_vllm(second, PROMPTS[1:], 4, SEEDS[1:])
    assert own.texts == everyone.texts[1:]
    assert [ids.tolist() for ids in own.prompt_ids] == PROMPTS[1:]


def test_draws_of_one_step_send_the_weights_once_and_an_update_sends_them_anew(
    setup_with, monkeypatch
):
    setup = setup_with(max_draws=3)
    asked = asked_of(setup.engine, monkeypatch)
    for _ in range(3):
        sample_rollouts_vllm(setup, PROMPTS, 2, SEEDS)
    assert asked == ["weights", *["sample"] * 3]
    with torch.no_grad():  # as the least update there is
        bias = setup.policy.model.norm.weight
        bias[0] = torch.nextafter(bias[0], torch.tensor(9.0))
    sample_rollouts_vllm(setup, PROMPTS, 2, SEEDS)
    assert asked[4:] == ["weights", "sample"]


def test_the_policy_is_whole_while_its_file_is_written_and_all_wait_with_patience(
    setup_with, monkeypatch
):
    setup, happened = setup_with(), []
    asked = asked_of(setup.engine, monkeypatch)

    def noted(name):
        @contextmanager
        def inside(_):
            happened.append(f"{name} begins")
            yield
            happened.append((f"{name} ends", *asked))
            asked.clear()

        return inside

    for name in ("whole", "patient"):
        monkeypatch.setattr(engine_module, name, noted(name))
    sample_rollouts_vllm(setup, PROMPTS, 2, SEEDS)
    assert happened == [
        "patient begins", "whole begins", ("whole ends", "weights"), ("patient ends", "sample"),
    ]  # fmt: skip


def test_two_processes_with_a_part_of_the_policy_each_are_sampled_for_as_one(python, tmp_path):
    def sampled(sharded):
        """(texts of three draws, the last after an update, what the engine was asked)."""
        accelerator, texts = Accelerator(cpu=True), []
        setup = engine_setup(
            without_layers(), accelerator, python, output_dir=str(tmp_path), vllm_timeout=20.0,
            max_prompt_length=8, max_completion_length=12, max_draws=2,
        )  # fmt: skip
        patch = pytest.MonkeyPatch()
        asked = asked_of(setup.engine, patch) if setup.engine else []
        if sharded:
            shard(setup.policy)
        own = [own_part(items, accelerator) for items in (PROMPTS, SEEDS)]
        for draw in range(3):
            if draw == 2:
                for parameter in setup.policy.parameters():
                    local_tensor(parameter.detach()).add_(0.05)
            texts.append(sample_rollouts_vllm(setup, own[0], 3, own[1]).texts)
        return texts, asked

    [(expected, once)] = launch(1, lambda: sampled(False))
    (first, asked), (second, nothing) = launch(2, lambda: sampled(True))
    assert [a + b for a, b in zip(first, second)] == expected
    assert once == asked == ["weights", "sample", "sample", "weights", "sample"]
    assert nothing == []


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("ends", "sample: the engine ended with exit status 7; see"),
        ("hangs", "sample: no answer within --vllm_timeout 0.3 seconds"),
        ("no_json", "sample: what it says is no JSON"),
        ("vocabulary", "it has 41 tokens, --model_name 40"),
        ("token", "not the completions that it was asked for"),
        ("number", "not the completions that it was asked for"),
        ("length", "not the completions that it was asked for"),
        ("count", "not the completions that it was asked for"),
        ("temperature", "nats per token off the policy's"),
        ("stale", "nats per token off the policy's"),
    ],
)
def test_whatever_is_wrong_with_an_answer_is_one_line(fault, message, setup_with, monkeypatch):
    monkeypatch.setenv("STUB_FAULT", fault)
    model = without_layers()
    with pytest.raises(UserError, match=f"^--sampler vllm: .*{message}"):
        setup = setup_with(model, temperature=1.5)
        setup.engine.channel.settimeout(0.3 if fault == "hangs" else 20)
        setup.engine.seconds = 0.3
        for _ in range(2):
            sample_rollouts_vllm(setup, PROMPTS, 4, SEEDS)
            with torch.no_grad():
                model.get_input_embeddings().weight += 0.01
    if fault in ("ends", "hangs", "no_json"):
        assert setup.engine.process.poll() is not None


def test_a_python_without_vllm_says_so(setup_with, tmp_path):
    with pytest.raises(UserError, match=r"^--sampler vllm: load: .*No module named 'vllm'; see "):
        setup_with(python=sys.executable)
    assert "Traceback" in (tmp_path / "vllm.log").read_text()
    (tmp_path / "text").write_text("no program")
    (tmp_path / "text").chmod(0o755)
    with pytest.raises(UserError, match=r"^--vllm_python .*text: "):
        setup_with(python=str(tmp_path / "text"))


def test_an_engine_ends_with_whoever_started_it(setup_with):
    setup = setup_with()
    process = setup.engine.process
    assert process.poll() is None
    del setup
    assert process.poll() is not None


def test_what_launchers_say_is_not_passed_on(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "KEPT"):
        monkeypatch.setenv(name, "1")
    known = engine_module.environment("2,3")
    assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"} & {*known}
    assert known["KEPT"] == "1" and known["CUDA_VISIBLE_DEVICES"] == "2,3"


@pytest.mark.parametrize("emptied", [True, False])
def test_the_worker_empties_the_prefix_cache_after_every_reload(emptied):
    calls = []

    class Engine:
        def collective_rpc(self, method, **more):
            calls.append((method, more))

        def reset_prefix_cache(self):
            calls.append("reset_prefix_cache")
            return emptied

    gpu = types.SimpleNamespace(current_platform=types.SimpleNamespace(is_cpu=lambda: False))
    worker = Worker()
    worker.engine = Engine()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
        patch.setitem(sys.modules, "vllm.platforms", gpu)
        if emptied:
            worker.weights("there")
        else:
            with pytest.raises(RuntimeError, match="not emptied"):
                worker.weights("there")
    reload = ("reload_weights", {"kwargs": {"weights_path": "there"}})
    assert calls == [reload, "reset_prefix_cache"]


# --- a run ---------------------------------------------------------------------------------------


@pytest.fixture
def flags(python, tmp_path, monkeypatch):
    """The flags of a run with the stub, in a folder of this name."""
    monkeypatch.setattr("records.run.plot_run", lambda run: run)  # seconds
    tokenizer = make_tokenizer()
    model = without_layers(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    more = ("--sampler", "vllm", "--vllm_python", python, "--max_prompt_length", 400)
    return lambda name, *last: flags_of(
        {"qwen2": tmp_path / "model"}, tmp_path / name, *more, *last
    )


def test_a_run_is_sampled_by_it_and_corrected_without_being_told(flags, command, tmp_path):
    assert command(*flags("run", "--num_train_iters", 2))[0] == 0
    lines = [line for _, line in read_jsonl(tmp_path / "run" / "metrics.jsonl")]
    assert len(lines) == 2
    assert all(line["mismatch"] < 1e-4 and "tis_capped" in line for line in lines)
    said = json.loads((tmp_path / "run" / "config.json").read_text())["flags"]
    assert (said["sampler"], said["tis_cap"]) == ("vllm", 2.0)


@pytest.mark.faults
@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_run_whose_engine_dies_goes_on_as_if_it_had_not(
    step, flags, command, tmp_path, monkeypatch
):
    assert command(*flags("whole"))[0] == 0
    monkeypatch.setenv("STUB_FAULT", f"ends {step}")
    status, _, message = command(*flags("broken"))
    assert status == 2
    [line] = [line for line in message.splitlines() if "error" in line]
    assert line.startswith("main.py: error: --sampler vllm: sample: the engine ended with exit ")
    assert "then --resume" in line and len(line) <= 200
    monkeypatch.delenv("STUB_FAULT")
    assert command("--resume", "--output_dir", tmp_path / "broken")[0] == 0
    for file in ("model/model.safetensors", "completions/step_00002.jsonl"):
        whole, broken = ((tmp_path / name / file).read_bytes() for name in ("whole", "broken"))
        assert whole == broken


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "--sampler vllm: needs --vllm_python"),
        (["--vllm_python", "nowhere/python"], "--vllm_python nowhere/python: no program"),
        (["--vllm_python", os.devnull], f"--vllm_python {os.devnull}: no program"),
        (["--vllm_arguments", "[]"], "argument --vllm_arguments: '[]' is no JSON object"),
        (["--vllm_arguments", '{"dtype": "int8"}'], "argument --vllm_arguments: dtype is what"),
        (["--top_p", "0.9"], "--top_p: --sampler vllm has no filters"),
        (["--stop", "#"], "--stop: --sampler vllm knows stop tokens alone"),
        (["--dataset_name", "calculator"], "cannot go on after the replies of this task"),
        (["--dataset_name", "kuhn"], "--sampler vllm: knows one policy"),
    ],
)
def test_what_it_cannot_do_is_refused_before_anything_loads(more, message, capsys):
    known = [] if "vllm_python" in message else ["--vllm_python", sys.executable]
    with pytest.raises(SystemExit) as stop:
        parse_args(["--preset", "cpu", "--sampler", "vllm", *known, *more])
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("main.py: error: ") and message in line
    assert line.count("\n") == 1 and len(line) <= 201


def test_the_correction_is_on_unless_it_is_said_otherwise():
    flags = ["--preset", "cpu", "--sampler", "vllm", "--vllm_python", sys.executable]
    assert parse_args(flags).tis_cap == 2.0
    assert parse_args([*flags, "--tis_cap", "0"]).tis_cap == 0.0
    assert parse_args(flags[:2]).tis_cap == 0.0
