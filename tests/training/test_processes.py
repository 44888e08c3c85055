"""Several processes do what one does: the same samples, gradients, answers and files."""

import json
import os
import runpy
import signal
import sys
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from conftest import ROOT, TASK, make_args, make_model, make_setup, make_tokenizer
from safetensors.torch import load_file
from several import launch
from sighted import Sized, make_seeing
from toys import flags_of, rollouts_from

import main
from evaluation.held_out import evaluate_policy
from evaluation.scoring import score
from grpo import group_advantages
from llms import chat_prompt, frozen_copy
from records.checkpoints import Saver, checkpoint_to_resume
from rldatasets import Problem, Problems
from sampling.groups import sample_groups
from sampling.turns import worked_ids
from training.cold_start import cold_start
from training.lora import freeze_tower, trained_parameters
from training.optimizer import make_optimizer
from training.processes import everyones, everyones_rollouts, from_main, own_groups, own_part
from training.sharding import shard, shard_if_configured, whole_tensor
from training.update import update_policy
from utils import Stopped, UserError, read_jsonl
from vision.sight import pictures_of

PROBLEMS = [Problem(f"{n} + {n * n}?", str(n + n * n), f"{n} + {n * n}") for n in range(7)]


def in_processes(count, function):
    """What function(accelerator) returns in each of `count` processes that see each other."""

    def with_accelerator():
        accelerator = Accelerator(cpu=True)
        assert accelerator.num_processes == count
        return function(accelerator)

    return launch(count, with_accelerator)


class Alone:
    num_processes, process_index = 1, 0


def test_parts_are_disjoint_complete_and_alike():
    accelerator = Alone()
    accelerator.num_processes = 3
    parts, shares, sizes = [], [], [9, 1, 1, 1, 6, 3, 0]
    for accelerator.process_index in range(3):
        parts.append(own_part(PROBLEMS, accelerator))
        shares.append(own_groups(sizes, accelerator))
    assert sum(parts, []) == PROBLEMS and sorted(map(len, parts)) == [2, 2, 3]
    assert torch.tensor(shares).sum(0).tolist() == [1] * 7
    assert [sum(n for n, own in zip(sizes, share) if own) for share in shares] == [9, 6, 6]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_what_belongs_together_is_one_process_s(count):
    accelerator, parts = Alone(), []
    accelerator.num_processes = count
    for accelerator.process_index in range(count):
        parts.append(own_part([*range(6)], accelerator, together=2))
    assert sum(parts, []) == [*range(6)] and all(len(part) % 2 == 0 for part in parts)
    assert own_part([7], Alone(), together=2) == [7]


def test_what_one_has_all_get_in_order():
    def gather(accelerator):
        mine = accelerator.process_index
        return everyones({"rank": mine}, accelerator), from_main(lambda: mine, accelerator)

    assert in_processes(3, gather) == [([{"rank": 0}, {"rank": 1}, {"rank": 2}], 0)] * 3


SETTINGS = {
    "grpo": {"kl_beta": 0.1},
    "dapo, two epochs": {
        "aggregation": "dapo",
        "num_inner_epochs": 2,
        "micro_batch_tokens": 60,
        "top_entropy": 0.3,
    },
    "dr_grpo, down-sampled": {"aggregation": "dr_grpo", "train_group_size": 2, "max_draws": 2},
    "fewer groups with signal than processes": {"kl_beta": 0.0, "only": 0},
    "flat groups skipped": {"kl_beta": 0.1, "skip_flat_groups": True, "only": 0},
}
UNEVEN = {
    "questions_per_step": 5, "sampling_batch_size": 6, "micro_batch_tokens": 60, "top_entropy": 0.5,
}  # fmt: skip


def reading():
    """A model, its tokenizer, and problems for it."""
    tokenizer = make_tokenizer()
    return make_model(vocab_size=len(tokenizer), dtype=torch.float64), tokenizer, PROBLEMS


def step_of(settings, accelerator, sharded=False, made=reading):
    """One step of the loop by hand in fp64: texts, the gradient of each update, what is measured,
    answers afterwards."""
    policy, tokenizer, problems = made()
    args = make_args(
        **{
            "questions_per_step": 6, "group_size": 3, "sampling_batch_size": 6, "seed": 1,
            "max_completion_length": 9, "train_group_size": 0, "overlong_buffer": 3,
            "max_grad_norm": 0.5, "eval_samples": 2, "eval_batch_size": 2, "cold_start_steps": 2,
            **settings,
        }
    )  # fmt: skip
    if sharded:
        shard(policy)
    task = replace(TASK, reward_functions=[spread])
    setup = make_setup(policy, args, accelerator, tokenizer, task)
    cold_start(setup, Problems(problems, 0), chat_prompt, worked_ids, pictures_of)
    setup = replace(setup, reference=frozen_copy(policy) if args.kl_beta else None)
    optimizer, _ = make_optimizer(policy, args)
    gradients = []

    def keep(*_):
        trained = trained_parameters(policy)
        gradients.append(torch.cat([whole_tensor(p.grad).flatten() for p in trained]))

    optimizer.register_step_pre_hook(keep)

    class Nowhere:
        def save_step(self, *_):
            return None

    _, rollouts, rewards = main.draw_groups(setup, Problems(problems, 0), 0, Nowhere())
    chosen = main.choose(rewards.total, args)
    advantages = group_advantages(rewards.total, "std", chosen)
    if "only" in settings:
        advantages[:] = 0.0
        advantages[0] = torch.tensor([1.0, -0.5, -0.5])
    metrics = update_policy(setup, optimizer, rollouts, advantages, chosen)
    summary, records = evaluate_policy(replace(setup, task=TASK), problems, 1)
    del summary["seconds/evaluation"]
    return rollouts.texts, torch.stack(gradients).numpy(), metrics, summary, records


def spread(completion, problem):
    """A reward that differs within a group."""
    return len(completion) % 5 / 4


@pytest.mark.parametrize(("count", "name"), zip((2, 3, 2, 3), SETTINGS))
def test_a_step_of_several_processes_is_that_of_one(name, count, accelerator):
    """Samples, every gradient to 1e-5 of its norm (in fp64: to rounding), metrics, and answers."""
    alone = step_of(SETTINGS[name], accelerator)
    assert abs(alone[1]).max() > 1e-3
    for step in in_processes(count, lambda several: step_of(SETTINGS[name], several)):
        assert_same_step(step, alone, gap=1e-9)


def assert_same_step(step, alone, gap):
    """Gradients may differ by `gap`, relative to the largest."""
    texts, gradients, metrics, summary, records = step
    assert texts == alone[0]
    assert abs(gradients - alone[1]).max() / abs(alone[1]).max() < gap
    counted = {k: v for k, v in metrics.items() if k != "tokens/padded"}  # passes differ
    assert counted == pytest.approx({k: alone[2][k] for k in counted}, rel=1e-6, abs=1e-6)
    assert summary == pytest.approx(alone[3]) and records == alone[4]


def test_a_step_of_a_sharded_policy_is_that_of_a_whole_one(accelerator):
    """FSDP2 on two processes that have unequal numbers of passes, and one of them none at all."""
    for settings in ({"kl_beta": 0.1, **UNEVEN}, SETTINGS["fewer groups with "
                     "signal than processes"]):  # fmt: skip
        alone = step_of(settings, accelerator)
        for step in in_processes(
            2, lambda several, settings=settings: step_of(settings, several, sharded=True)
        ):
            assert_same_step(step, alone, gap=1e-6)


def seeing():
    """The same of one that sees, whose problems show one image, two, or none."""
    policy, tokenizer = make_seeing("qwen2_5_vl", torch.float64)
    freeze_tower(policy)
    sizes = [(40, 32), (64, 48), (32, 32)]
    shown = [tuple(Sized(*size, n) for size in sizes[: n % 3]) for n in range(7)]
    problems = [replace(p, images=images) for p, images in zip(PROBLEMS, shown)]
    return policy, tokenizer, problems


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_a_step_of_several_processes_that_see_is_that_of_one(sharded, accelerator):
    settings = {"kl_beta": 0.1, **UNEVEN, "max_completion_length": 5}
    alone = step_of(settings, accelerator, made=seeing)
    assert abs(alone[1]).max() > 1e-3 and alone[3]["blind_accuracy"] is not None
    for step in in_processes(2, lambda both: step_of(settings, both, sharded, seeing)):
        assert_same_step(step, alone, gap=1e-6)


def test_a_step_without_signal_changes_nothing_in_several_processes_either(accelerator):
    def weights(accelerator):
        policy = make_model(vocab_size=20)
        args = make_args(learning_rate=0.1)
        optimizer, _ = make_optimizer(policy, args)
        rollouts, setup = rollouts_from(policy), make_setup(policy, args, accelerator)
        for advantages in (torch.tensor([[1.0, -1.0, 0.5, -0.5]] * 3), torch.zeros(3, 4)):
            before = [p.detach().clone() for p in policy.parameters()]
            update_policy(setup, optimizer, rollouts, advantages)
        return all(map(torch.equal, before, policy.parameters()))

    assert weights(accelerator)
    assert in_processes(2, weights) == [True, True]


def steps_of_ones(path, accelerator, sharded, until, resume=None, interrupted=None):
    """AdamW's steps from gradients of one, saved at the last. Returns the saver's steps done."""
    policy = make_model(seed=3)
    args = make_args(
        output_dir=str(path), keep_checkpoints=9, seed=1, resume=resume, learning_rate=0.01
    )
    if sharded:
        shard(policy)
    optimizer, _ = make_optimizer(policy, args)
    start = from_main(lambda: checkpoint_to_resume(args), accelerator)
    saver = Saver(make_setup(policy, args, accelerator, make_tokenizer()), optimizer, {}, start)
    try:
        with saver:
            while saver.done < until:
                for parameter in policy.parameters():
                    parameter.grad = torch.ones_like(parameter)
                optimizer.step()
                if (saver.done, accelerator.process_index) == interrupted:
                    os.kill(os.getpid(), signal.SIGTERM)
                saver.completed(saver.done + 1)
            saver.save()
    except Stopped as stop:
        assert stop.number == signal.SIGTERM
    return saver.done


def test_a_sharded_policy_s_checkpoint_is_any_run_s_and_a_signal_to_one_process_stops_all(
    tmp_path, accelerator
):
    straight, run = tmp_path / "straight", tmp_path / "run"
    assert steps_of_ones(straight, accelerator, False, 4) == 4
    stopped = in_processes(2, lambda both: steps_of_ones(run, both, True, 4, interrupted=(1, 1)))
    assert stopped == [2, 2]
    saved = run / "checkpoints" / "step_00002"
    config = json.loads((saved / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert in_processes(2, lambda both: steps_of_ones(run, both, True, 3, "latest")) == [3, 3]
    assert steps_of_ones(run, accelerator, False, 4, "latest") == 4
    ends = [path / "checkpoints" / "step_00004" for path in (straight, run)]
    for (name, whole), (again, resumed) in zip(
        *(load_file(end / "model.safetensors").items() for end in ends), strict=True
    ):
        assert name == again and torch.equal(whole, resumed)


def test_each_process_scores_its_own_completions_alone():
    tokenizer = make_tokenizer()
    model = make_model(vocab_size=len(tokenizer))

    def scored(accelerator):
        args = make_args(group_size=2, max_completion_length=4)
        setup, asked = make_setup(model, args, accelerator, tokenizer), []
        own = own_part(PROBLEMS[:5], accelerator)
        part = sample_groups(setup, own, range(len(own)))
        score(part, own, [lambda completion, problem: asked.append(problem.question) or 0.0])
        return asked, [len(p.texts) for p in everyones_rollouts(part, accelerator)]

    first, second = in_processes(2, scored)
    assert first[0] == [p.question for p in PROBLEMS[:2] for _ in range(2)]
    assert second[0] == [p.question for p in PROBLEMS[2:5] for _ in range(2)]
    assert first[1] == second[1] == [2, 3]


@pytest.mark.parametrize(
    "name, kind, processes",
    [("1x80gb", "NO", 1), ("8x80gb_ddp", "MULTI_GPU", 8), ("8x80gb_fsdp2", "FSDP", 8)],
)
def test_accelerate_reads_the_configurations(name, kind, processes):
    config = load_config_from_file(str(ROOT / "configs" / "accelerate" / f"{name}.yaml"))
    assert (config.distributed_type, config.num_processes) == (kind, processes)
    assert config.mixed_precision == "bf16"
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2


class Configured:
    def __init__(self, kind, is_fsdp2):
        self.distributed_type, self.is_fsdp2 = kind, is_fsdp2


@pytest.mark.parametrize(
    ("kind", "is_fsdp2", "flags", "complaint"),
    [
        (DistributedType.FSDP, False, {}, "asks for FSDP, which is not supported"),
        (DistributedType.DEEPSPEED, False, {}, "asks for DEEPSPEED, which is not supported"),
        (DistributedType.FSDP, True, {"lora_rank": 8}, "--lora_rank: adapters are not cut up"),
        (DistributedType.FSDP, True, {"sampler": "paged"}, "--sampler paged: copies the model"),
    ],
)
def test_configurations_that_would_not_work_are_refused(kind, is_fsdp2, flags, complaint):
    args = make_args(**flags)
    with pytest.raises(UserError, match=complaint):
        shard_if_configured(None, args, Configured(kind, is_fsdp2))


# --- the whole command -------------------------------------------------------------------------


@pytest.fixture
def several(tmp_path):
    """Runs main.py in `count` processes at once. Returns [(exit status, its output), ...]."""

    def run(count, *argv):
        def command():
            rank = os.environ["RANK"]
            output = os.open(tmp_path / f"output{rank}", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
            sys.argv = ["main.py", *map(str, argv)]
            sys.modules.pop("launch.door", None)
            status = 0
            try:
                runpy.run_path(str(ROOT / "main.py"), run_name="__main__")
            except SystemExit as stop:
                status = stop.code
            sys.__stdout__.flush()
            sys.__stderr__.flush()
            return status, (tmp_path / f"output{rank}").read_text()

        return launch(count, command)

    return run


@pytest.mark.faults  # for its length
def test_a_run_of_several_processes_is_that_of_one_and_resumes_with_another_number(
    saved_models, tmp_path, several, command
):
    runs = {name: tmp_path / name for name in ("one", "two")}
    status, *_ = command(*flags_of(saved_models, runs["one"]))
    assert status == 0
    (first, shown), (second, silent) = several(2, *flags_of(saved_models, runs["two"]))
    assert (first, second) == (0, 0)
    assert "The report, to open in a browser" in shown and silent == ""
    assert {p.name for p in runs["one"].iterdir()} == {p.name for p in runs["two"].iterdir()}

    def close(left, right):
        for name in ("metrics.jsonl", "eval.jsonl"):
            pairs = zip(read_jsonl(left / name), read_jsonl(right / name), strict=True)
            for (_, a), (_, b) in pairs:
                kept = {k for k in a if "second" not in k and k not in ("alarms", "tokens/padded")}
                assert {k: b[k] for k in kept} == pytest.approx(
                    {k: a[k] for k in kept}, rel=1e-3, abs=1e-5
                )

    close(runs["one"], runs["two"])
    for count in (1, 3):
        (status, shown), *_ = several(count, "--resume", runs["two"] / "checkpoints" / "step_00002")
        assert status == 0 and "going on from" in shown
        close(runs["one"], runs["two"])


def test_a_mistake_is_told_once_and_a_failing_process_ends_all_with_its_own_message(
    saved_models, tmp_path, several
):
    several_flags = flags_of(saved_models, tmp_path / "run")
    outputs = several(2, *several_flags, "--group_sise", 4)
    assert [status for status, _ in outputs] == [2, 2]
    assert "did you mean --group_size?" in outputs[0][1] and outputs[1][1] == ""
    outputs = several(7, *several_flags)
    assert outputs[0] == (2, "main.py: error: --questions_per_step 6: less than one for each of 7 "
                          "processes; raise it, or start fewer\n")  # fmt: skip
