"""The run's directory: metrics, configuration, evaluations, summary, and what is cut back."""

import json
import shlex
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import make_args, make_setup, make_tokenizer
from faults import lines
from scipy import stats
from tqdm import tqdm

from records.run import Run, show_progress, step_metrics, summary_table
from rldatasets import Problem
from sampling.rollouts import Rollouts
from utils import Stopped, jsonl, read_jsonl, write_jsonl


@pytest.mark.parametrize(
    ("filters", "surprise"),
    [({}, "entropy"), ({"top_k": 5}, "cross_entropy"), ({"top_p": 0.9}, "cross_entropy"),
     ({"min_p": 0.1}, "cross_entropy")],
)  # fmt: skip
def test_step_metrics_match_hand_computed_values(filters, surprise):
    """Of filtered samples, -logprob under the unfiltered policy is no entropy."""
    mask = torch.tensor([[[True, True], [True, False]]])
    rollouts = Rollouts(
        prompt_ids=[torch.tensor([1])],
        completion_ids=torch.tensor([[[4, 5], [4, 9]]]),
        completion_mask=mask,
        texts=[["a", "b"]],
        logprobs=torch.tensor([[[-1.0, -2.0], [-3.0, 0.0]]]),
        finished=torch.tensor([[False, True]]),
    )
    rewards = SimpleNamespace(
        names=["correctness", "brevity"],
        per_function=torch.tensor([[[2.0, 0.5], [0.0, 0.5]]]),
        total=torch.tensor([[2.5, 0.5]]),
    )
    setup = make_setup(None, make_args(**filters), None, make_tokenizer())
    setup.stopwatch.seconds = {"sampling": 1.5}
    metrics = step_metrics(7, rollouts, rewards, {"loss": 0.25}, setup)
    assert metrics == pytest.approx({
        "step": 7, "reward": 1.5, "reward_std": 2**0.5, "rewards/correctness": 1.0,
        "rewards/brevity": 0.5, "loss": 0.25, surprise: 2.0, "completion_length": 1.5,
        "truncated": 0.5, "flat_groups": 0.0, "tokens_per_second": 2.0, "seconds/sampling": 1.5,
        "tokens/sampled": 3, "tokens/distinct": 2, "tokens/flat": 0, "tokens/truncated": 2,
        "completions/sampled": 2,
    })  # fmt: skip


def test_the_configuration_records_flags_versions_and_commit_but_no_token(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_canary1234567890")
    monkeypatch.setattr("sys.argv", ["main.py", "--output_dir", "a b"])
    run = Run(tmp_path / "run")
    run.save_config(SimpleNamespace(seed=3, kl_beta=0.0), "cpu", left_out=2)
    text = (run.path / "config.json").read_text()
    config = json.loads(text)
    assert config["flags"] == {"seed": 3, "kl_beta": 0.0}
    assert config["left_out"] == 2
    assert shlex.split(config["command"])[1:] == ["main.py", "--output_dir", "a b"]
    assert config["packages"]["transformers"]
    assert "commit" in config
    assert "canary" not in text


def test_the_summary_shows_before_and_after(tmp_path):
    before = {"problems": 100, "accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6,
              "format_rate": 0.9, "rewards/correctness": 1.0}  # fmt: skip
    after = {**before, "accuracy": 0.75, "accuracy_low": 0.66, "accuracy_high": 0.82}
    row = {"seconds/policy": 3.0, "seconds/sampling": 1.0, "tokens/sampled": 200,
           "tokens/trained": 120, "tokens/flat": 50, "tokens/truncated": 10, "tokens/padded": 6,
           "completions/sampled": 16, "completions/trained": 9}  # fmt: skip
    write_jsonl(tmp_path / "metrics.jsonl", [{"step": step, **row} for step in range(2)])
    table = summary_table(tmp_path, before, after)
    assert "8 s: sampling 25%, policy 75%" in table
    assert "400 tokens sampled: 60% carried gradient (18 of 32 completions)" in table
    assert "25% in flat groups, 5% cut off; padding 3% on top" in table
    assert table.endswith(f"{tmp_path}/report.html")
    assert "50.0% [40.0%, 60.0%]" in table and "75.0% [66.0%, 82.0%]" in table
    assert f"{tmp_path}/plots/overview.png" in table


@pytest.mark.parametrize("alarms", [[], ["truncated: too long", "kl: too far"]])
def test_a_step_s_alarms_are_printed_one_a_line(alarms, capsys):
    metrics = {"step": 3, "reward": 1.0, "kl": 0.1, "completion_length": 9.0,
               "tokens_per_second": 5.0, "alarms": alarms}  # fmt: skip
    bar = tqdm(total=5, file=sys.stderr)
    show_progress(bar, metrics, {"accuracy": 0.5}, None)
    written = capsys.readouterr().out
    assert written == "".join(f"step 3: alarm: {alarm}\n" for alarm in alarms)
    assert bar.n == 1


def test_a_first_line_that_was_cut_short_is_gone_when_the_run_starts_anew(tmp_path):
    for name in ("metrics.jsonl", "eval.jsonl"):
        (tmp_path / name).write_text('{"step": 0, "rew')
    run = Run(tmp_path)
    run.cut_back(0)
    run.log_step({"step": 0, "reward": 1.0})
    run.log_evaluation(0, {"accuracy": 0.5, "accuracy_low": 0, "accuracy_high": 1}, [])
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert [row["step"] for row in lines(tmp_path / name)] == [0]


def test_what_is_later_than_the_checkpoint_is_cut_off(tmp_path):
    run = Run(tmp_path)
    for done in range(5):
        (run.completions / f"step_{done:05d}.jsonl").write_text("{}")
        run.log_evaluation(done, {"accuracy": done / 10, "accuracy_low": 0, "accuracy_high": 1}, [])
        run.log_step({"step": done, "reward": 0.1 + 0.2})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "rew')  # it died here
    run = Run(tmp_path)
    run.cut_back(3)
    assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == [0, 1, 2]
    assert [row["step"] for row in lines(tmp_path / "eval.jsonl")] == [0, 1, 2, 3]
    assert sorted(path.name for path in run.completions.iterdir()) == [
        *(f"eval_{step:05d}.jsonl" for step in range(4)),
        *(f"step_{step:05d}.jsonl" for step in range(3)),
    ]
    assert {step: row["accuracy"] for step, row in run.evaluations.items()} == {
        step: step / 10 for step in range(4)
    }
    text = (tmp_path / "metrics.jsonl").read_text()
    run.cut_back(3)
    assert (tmp_path / "metrics.jsonl").read_text() == text == jsonl(
        {"step": step, "reward": 0.1 + 0.2, "alarms": []} for step in range(3)
    )  # fmt: skip


def test_a_first_line_that_was_not_finished_is_cut_off_too(tmp_path):
    (tmp_path / "eval.jsonl").write_text('{"step": 0, "accu')
    Run(tmp_path).cut_back(0)
    assert (tmp_path / "eval.jsonl").read_text() == ""


def test_what_is_watched_is_written_under_its_step_s_number_and_nothing_without(tmp_path):
    run = Run(tmp_path)
    problems = [Problem("1?", "1", "")] * 4
    run.save_tokens(1, problems, [{"row": 3}])
    run.save_tokens(2, problems, [])
    [file] = run.completions.iterdir()
    assert file.name == "tokens_00001.jsonl" and read_jsonl(file) == [(1, {"row": 3})]


# --- evaluations -------------------------------------------------------------------------------


def records_of(verdicts):
    return [
        {"question": f"{i}?", "answer": "1", "completion": "", "correct": verdict}
        for i, verdict in enumerate(verdicts)
    ]


def test_later_evaluations_are_tested_against_step_0_on_the_same_questions(tmp_path):
    run = Run(tmp_path)
    first, later = [True] * 5 + [False] * 15, [False] + [True] * 11 + [False] * 8
    assert run.log_evaluation(0, {"accuracy": 0.25}, records_of(first)) == {"accuracy": 0.25}
    summary = run.log_evaluation(10, {"accuracy": 0.55}, records_of(later))
    assert summary["mcnemar_p"] == pytest.approx(stats.binomtest(7, 8).pvalue)
    other = run.log_evaluation(20, {"accuracy": 0.55}, records_of(later[:-1]))
    assert other["mcnemar_p"] is None  # other questions: nothing to pair
    rows = [row for _, row in read_jsonl(tmp_path / "eval.jsonl")]
    assert [row["step"] for row in rows] == [0, 10, 20]
    assert "mcnemar_p" not in rows[0] and rows[1]["mcnemar_p"] == summary["mcnemar_p"]


def test_figures_are_drawn_while_what_is_inside_goes_on_and_their_errors_are_told(
    tmp_path, monkeypatch
):
    drawing, inside = threading.Event(), threading.Event()

    def draw(path):
        drawing.set()
        assert inside.wait(10)
        raise OSError("no room")

    monkeypatch.setattr("records.run.plot_run", draw)
    with pytest.raises(OSError, match="no room"), Run(tmp_path).drawn_meanwhile(3):
        assert drawing.wait(10)
        inside.set()


def test_a_report_is_written_only_once_what_is_inside_is_done(tmp_path, monkeypatch):
    """`--resume` takes a run with a report for one that has finished."""
    monkeypatch.setattr("records.run.plot_run", lambda path: path)
    monkeypatch.setattr("records.run.write_report", lambda path: (path / "report.html").touch())
    report = tmp_path / "report.html"
    with pytest.raises(Stopped), Run(tmp_path).drawn_meanwhile(3, with_report=True):
        raise Stopped(2)
    assert not report.exists()
    with Run(tmp_path).drawn_meanwhile(3, with_report=True):
        time.sleep(0.2)
        assert not report.exists()
    assert report.exists()
