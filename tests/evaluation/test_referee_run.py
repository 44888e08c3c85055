"""A referee in a run: logged, kept, resumed bit for bit, refused where it cannot judge."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import make_args, make_model, make_setup, make_tokenizer
from safetensors.torch import load_file
from several import launch
from test_referee import ASKING, Stub, better
from toys import record

import main
from evaluation import referees
from evaluation.referee import Referee, bound
from evaluation.referees import judge_of, referee_metrics, start_model, try_out, with_referees
from evaluation.scoring import judged_ahead, score
from evaluation.win_rate import against_start, win_rate
from evaluator import tournament
from launch.parser import parse_args
from records.alarms import first_slot, second_referee
from rldatasets import Problem, completion_fields
from sampling.turns import transcript
from training.lora import add_adapter, trained_parameters
from training.processes import everyones, make_accelerator, own_part
from utils import UserError

FILE = """
from evaluator import correctness, of_group, tournament

CRITERION = "is longer"
SYSTEM_PROMPT = "Answer."
PAIRS = [("long", "short"), ("short", "long")]  # of which no referee is right on both
GOLDEN = [(f"{n}?", *pair) for n in range(3) for pair in PAIRS]


def is_correct(completion, problem):
    return "a" in completion


REWARD_FUNCTIONS = [correctness, tournament]
"""


@pytest.fixture
def flags(saved_models, tmp_path):
    (tmp_path / "rewards.py").write_text(FILE)
    rows = [{"question": f"{n}?", "answer": str(n), "solution": str(n)} for n in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "--preset", "cpu", "--model_name", str(saved_models["qwen2"]), "--evaluator",
        str(tmp_path / "rewards.py"), "--dataset_path", str(tmp_path / "data.jsonl"),
        "--questions_per_step", "2", "--group_size", "3", "--max_completion_length", "6",
        "--cold_start_steps", "1", "--eval_problems", "4", "--learning_rate", "1e-2",
        "--cold_start_learning_rate", "1e-2", "--lr_schedule", "constant", "--warmup_percent", "0",
        "--referee", "start",
    ]  # fmt: skip


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.figures
def test_a_run_is_judged_twice_resumed_bit_for_bit_and_asks_nothing_again(
    flags, saved_models, tmp_path
):
    second = tmp_path / "second"
    model, tokenizer = make_model(vocab_size=260, seed=9), make_tokenizer()
    model.save_pretrained(second)
    tokenizer.save_pretrained(second)
    flags += ["--eval_referee", str(second), "--referee_anyway"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    main.train(parse_args([*flags, "--output_dir", str(whole), "--num_train_iters", "3"]))
    rows = lines(whole / "metrics.jsonl")
    for row in rows:
        assert row["rewards/tournament"] == pytest.approx(0.5)
        assert row["referee/calls"] + row["referee/cached"] <= 2 * 3 * 2
        assert 0 <= row["referee/first_slot"] <= 1 and 0 <= row["referee/consistent"] <= 1
    before, after = lines(whole / "eval.jsonl")
    assert not any(key.startswith("win_rate") for key in before)
    for role in ("referee", "eval_referee"):
        assert after[f"win_rate/{role}_low"] <= after[f"win_rate/{role}"] <= 1
        assert after[f"{role}/unread"] == 0
    wins = [row["wins"] for row in lines(whole / "completions/eval_00003.jsonl")]
    assert win_rate([row["eval_referee"] for row in wins], "x")["win_rate/x"] == pytest.approx(
        after["win_rate/eval_referee"]
    )
    assert {"win_rate_referee", "referee_first_slot"} <= {
        path.stem.removeprefix("eval_") for path in (whole / "plots").iterdir()
    }
    main.train(parse_args([*flags, "--output_dir", str(parts), "--num_train_iters", "2"]))
    with (parts / "referee.jsonl").open("a") as file:
        file.write('{"referee": "cut')  # where the machine went down
    main.train(parse_args(["--resume", "--output_dir", str(parts), "--num_train_iters", "3"]))
    for ours, theirs in zip(rows, lines(parts / "metrics.jsonl")):
        assert {k: v for k, v in ours.items() if "second" not in k} == {
            k: v for k, v in theirs.items() if "second" not in k
        }
    ours, theirs = (load_file(run / "model/model.safetensors") for run in (whole, parts))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_one_that_cannot_judge_is_refused_before_step_1_in_a_line(flags, tmp_path, command):
    status, _, err = command(*flags, "--output_dir", tmp_path / "run", "--num_train_iters", "1")
    assert status == 2 and "of 6 golden pairs" in err and "--referee_anyway" in err
    assert err.count("\n") <= 3


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--eval_referee", "start"], "--eval_referee start: is the --referee"),
        (["--referee_url", "http://x/v1"], "--referee start: --referee_url names one already"),
        (["--referee_model", "x"], "--referee_model x: goes with --referee_url"),
        (["--referee", "no/such dir"], "--referee no/such dir: no such directory"),
    ],
)
def test_flags_that_do_not_go_together_are_named(flags, more, said, command, tmp_path):
    status, _, err = command(*flags, *more, "--output_dir", tmp_path / "run")
    assert status == 2 and said in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "the reward tournament asks a referee, and there is none"),
        (["--referee_pairs", "2"], "--referee_pairs 2: there is no referee"),
        (["--referee_url", "x"], "--referee_url x: no address of a server; expected such as"),
        (["--referee_url", "http://127.0.0.1:port/v1"], "port/v1: no address of a server"),
        (["--referee_url", "http://127.0.0.1:80v1"], "80v1: no address of a server"),
        (["--referee_url", "http://x/v1?key=1"], "no address of a server; expected such as http"),
        (["--referee_url", "http://me:secret@x/v1"], "--referee_url: holds a name or password"),
        (["--referee_url", "http://x/v1"], "which of its models? Name it with --referee_model"),
    ],
)
def test_a_reward_that_asks_needs_somebody_to_ask(flags, more, said, command, tmp_path):
    status, _, err = command(*flags[:-2], *more, "--output_dir", tmp_path / "run")
    assert status == 2 and said in err and err.count("\n") == 1


def test_the_lint_prints_the_card_and_fails_where_it_cannot_judge(flags, command):
    kept = [*flags[2:8], "--referee", "start", "--preset", "cpu"]
    status, out, err = command("lint", *kept)
    assert (status, err.count("error")) == (1, 0)
    assert "50% [19%, 81%] of 6" in out and "- the referee is right on 50% of 6 golden pairs" in out
    status, _, err = command("lint", *kept[:-4], "--referee_model", "x")
    assert status == 2 and "--referee_model x: goes with --referee_url" in err


def test_a_group_is_shown_with_what_the_referee_gives_and_one_answer_without(flags, command):
    asked = [flags[3], "4 of what?", "--preset", "cpu", *flags[4:6], "--max_completion_length", "6"]
    group = ["group", *asked, "--group_size", "3"]
    status, out, _ = command(*group, "--referee", "start", "--referee_anyway")
    assert status == 0 and out.count("tournament 0.") == 3
    status, _, err = command(*group)
    assert status == 2 and "the reward tournament asks a referee, and there is none" in err
    status, out, err = command("chat", *asked)
    assert status == 0 and "correctness" in out and "tournament" not in out, err


# --- who the start model is --------------------------------------------------------------------


def test_start_is_the_model_of_the_file_and_shared_where_the_reference_is_that(
    saved_models, monkeypatch
):
    monkeypatch.setattr(referees, "rendering_of", lambda args: None)
    moved, reference = make_model(seed=5), make_model(seed=6)
    args = make_args(model_name=str(saved_models["qwen2"]), cold_start_steps=1)
    setup = make_setup(moved, args, reference=reference)
    found, _ = start_model(setup)
    saved = load_file(saved_models["qwen2"] / "model.safetensors")
    assert torch.equal(found.state_dict()["model.norm.weight"], saved["model.norm.weight"])
    assert not any(parameter.requires_grad for parameter in found.parameters())
    args.cold_start_steps = 0
    assert start_model(setup)[0] is reference
    args.update_ref_model = True
    assert start_model(setup)[0] is not reference


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_its_matrices_are_in_what_the_run_computes_in(precision, dtype, saved_models, monkeypatch):
    monkeypatch.setattr(referees, "rendering_of", lambda args: None)
    model = str(saved_models["qwen2"])
    flags = {"referee_url": None, "micro_batch_tokens": 0, "precision": precision}
    for who in ("start", model):
        args = make_args(model_name=model, cold_start_steps=1, referee=who, **flags)
        judge = judge_of(make_setup(make_model(), args), "referee")
        assert judge.model.model.layers[0].mlp.up_proj.weight.dtype == dtype


def test_it_has_one_name_whatever_the_adapter_beside_it_has_learnt(saved_models):
    """On --resume the adapter is new when the referee is made, and its answers are to be found."""
    model, names = str(saved_models["qwen2"]), []
    for learnt in (0.0, 0.5):
        args = make_args(
            model_name=model, referee="start", referee_url=None, micro_batch_tokens=0,
            lora_rank=2, lora_alpha=4.0, lora_targets=["q_proj"],
        )  # fmt: skip
        setup = make_setup(make_model(), args, tokenizer=make_tokenizer())
        add_adapter(setup.policy, args)
        with torch.no_grad():
            for parameter in trained_parameters(setup.policy):
                parameter.add_(learnt)
        names.append(judge_of(setup, "referee").name)
    assert names[0] == names[1]


def test_who_measures_is_not_who_rewards_under_another_name(flags, saved_models, tmp_path, command):
    more = ["--eval_referee", str(saved_models["qwen2"]), "--referee_anyway"]
    status, _, err = command(*flags, *more, "--output_dir", tmp_path / "run")
    assert status == 2 and "has the weights of the --referee, which cannot check itself" in err


def test_a_referee_that_cannot_be_loaded_is_named_by_its_own_flag(flags, tmp_path, command):
    model = make_model()
    model.save_pretrained(tmp_path / "broken")
    make_tokenizer().save_pretrained(tmp_path / "broken")
    (tmp_path / "broken/model.safetensors").write_bytes(b"1234567890")
    flags = [*flags[:-1], str(tmp_path / "broken")]
    status, _, err = command(*flags, "--output_dir", tmp_path / "run")
    assert status == 2 and "--referee " in err and "--model_name" not in err, err


def test_another_judge_of_the_same_run_is_told(tmp_path, saved_models, capfd, monkeypatch):
    monkeypatch.setattr(referees, "rendering_of", lambda args: None)
    args = make_args(
        model_name=str(saved_models["qwen2"]), referee="start", eval_referee=None, referee_url=None,
        micro_batch_tokens=0, referee_pairs=0, referee_anyway=True,
    )  # fmt: skip
    setup = make_setup(make_model(), args, tokenizer=make_tokenizer(), task=ASKING)
    for other, told in ((False, False), (False, False), (True, True), (True, False)):
        if other:
            args.referee = str(saved_models["llama"])
        with_referees(setup, tmp_path)
        assert ("is not who judged this run so far" in capfd.readouterr().err) == told


def test_a_debate_s_arguments_are_not_compared_with_those_of_step_0():
    records = [record("1?", True)]
    setup = make_setup(make_model(), task=replace(ASKING, rebut=lambda *_: None))
    setup = replace(setup, referees={"referee": None})
    assert against_start(setup, lambda: 1 / 0, {}, records) == ({}, records)


def test_without_a_referee_nothing_changes():
    setup = make_setup(make_model())
    assert with_referees(setup) is setup
    summary, records = {"accuracy": 1.0}, [record("1?", True)]
    assert against_start(setup, lambda: 1 / 0, summary, records) == (summary, records)


def tried(judge, role="referee", task=ASKING, **flags):
    setup = make_setup(None, make_args(**flags), task=task)
    referee = Referee(judge, task)
    try_out(role, referee, setup)
    return referee


def test_golden_pairs_set_the_scale_and_none_is_a_reason_to_refuse(capsys):
    referee = tried(Stub(better))
    assert referee.scale(ASKING.criterion).tau == pytest.approx(2.0, abs=0.1)
    assert referee.counts()["calls"] == 0
    blind = replace(ASKING, golden=())
    with pytest.raises(UserError, match="no GOLDEN"):
        tried(Stub(better), task=blind)
    tried(Stub(better), task=blind, referee_anyway=True)
    # One that only measures is told, and the run goes on.
    tried(Stub(lambda text: -better(text)), role="eval_referee")
    out = capsys.readouterr().out
    assert out.count("warning: referee: the referee: no GOLDEN") == 1
    assert out.count("warning: eval_referee: the referee is right on 0%") == 1
    assert "warning: eval_referee: a text that says nothing wins" in out


# --- the win rate ------------------------------------------------------------------------------


def test_answers_meet_those_of_step_0_question_by_question():
    before = [record(f"{n}?", True, "xx") for n in range(6)]
    after = [record(f"{n}?", True, text) for n, text in enumerate("x xxx xxxx xx xxx xxxx".split())]
    judge = Stub(lambda text: 5.0 * len(text), slot=7.0)
    setup = make_setup(None, make_args(), task=ASKING)
    setup = replace(
        setup, tokenizer=SimpleNamespace(), referees={"referee": Referee(judge, ASKING)}
    )
    order = [3, 0, 5, 1, 2, 4]
    summary, records = against_start(setup, lambda: before, {"n": 6}, [after[n] for n in order])
    assert [row["question"] for row in records] == [f"{n}?" for n in order]
    chances = {row["question"]: row["wins"]["referee"] for row in records}
    assert chances["0?"] < 0.01 and chances["3?"] == 0.5 and chances["2?"] > 0.99
    assert summary["win_rate/referee"] == pytest.approx(4.5 / 6)
    assert summary["win_rate/referee_p"] == pytest.approx(2 * 6 / 32)  # 4 won, 1 lost
    assert summary["referee/first_slot"] == pytest.approx(0.7, abs=0.31)
    # A question that stands there twice has two answers, and each its own verdict.
    twice = [after[1], {**after[1], "completion": "x"}]
    _, records = against_start(setup, lambda: [before[1]] * 2, {}, twice)
    assert records[0]["wins"]["referee"] > 0.5 > records[1]["wins"]["referee"]
    others = [record("another?", True)]
    assert against_start(setup, lambda: others, {}, after) == ({}, after)


def test_of_an_episode_the_last_turn_meets_the_last_turn_of_step_0():
    """Step 0 comes from the disk, where an episode is one long text and its turns."""
    text = transcript(("ask", "a long reply", "fine"))
    now = [{**record("0?", True), **completion_fields(text)}]
    before = json.loads(json.dumps(now))
    setup = make_setup(None, make_args(), task=ASKING, tokenizer=SimpleNamespace())
    setup = replace(setup, referees={"referee": Referee(Stub(), ASKING)})
    summary, _ = against_start(setup, lambda: before, {}, now)
    assert summary["win_rate/referee"] == 0.5 and summary["referee/calls"] == 0  # the same text


# --- alarms ------------------------------------------------------------------------------------


def test_an_alarm_where_the_place_decides_and_where_the_second_referee_does_not_follow():
    rows = [{"step": n, "referee/first_slot": share} for n, share in enumerate([0.7] * 5)]
    assert first_slot(rows, []) is None
    assert "100%" in first_slot([{"step": 0, "referee/first_slot": 1.0}], [])
    assert "10% of the referee's verdicts" in first_slot(
        [{"step": n, "referee/first_slot": 0.1} for n in range(5)], []
    )
    hacked = {"win_rate/referee": 0.8, "win_rate/referee_low": 0.7, "win_rate/eval_referee": 0.5,
              "win_rate/eval_referee_low": 0.4}  # fmt: skip
    assert "prefers 80%" in second_referee(rows, [{"step": 5, **hacked}])
    agreed = {**hacked, "win_rate/eval_referee_low": 0.55}
    assert second_referee(rows, [{"step": 5, **agreed}]) is None
    assert second_referee(rows, [{"step": 5, "accuracy": 0.5}]) is None


# --- several processes -------------------------------------------------------------------------


def test_two_processes_judge_and_count_what_one_does():
    problems = [Problem(f"{n}?", "1", "") for n in range(3)]
    groups = [["x" * (n + 1), "x" * (2 * n + 2), "x" * (7 - n)] for n in range(3)]
    before = [{**record(f"{n}?", True, "xxx"), "answer": "1"} for n in range(3)]
    after = [{**record(f"{n}?", True, "x" * (n + 2)), "answer": "1"} for n in range(3)]

    def judged():
        accelerator = make_accelerator()
        referee = Referee(Stub(lambda text: len(text) / 3, slot=5.0), ASKING)
        functions = [bound(tournament, referee=referee)]
        task = replace(ASKING, reward_functions=functions)
        setup = make_setup(None, make_args(), accelerator, SimpleNamespace(), task)
        setup = replace(setup, referees={"referee": referee})
        own = own_part([*zip(groups, problems)], accelerator)
        rollouts = SimpleNamespace(texts=[texts for texts, _ in own])
        judged_ahead(rollouts, [problem for _, problem in own], setup, functions)
        earned = score(rollouts, [problem for _, problem in own], functions)
        totals = torch.cat([part.total for part in everyones(earned, accelerator)]).tolist()
        metrics = referee_metrics(setup)
        return totals, metrics, against_start(setup, lambda: before, {}, after)

    alone = judged()
    assert alone[1]["referee/calls"] == 3 * 3 * 2
    for found in launch(2, judged):
        assert found == alone
