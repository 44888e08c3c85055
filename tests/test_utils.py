"""Seeds, JSON lines, the stopwatch and the run's files."""

import json
import shlex
import time
from types import SimpleNamespace

import pytest
import torch

from records.run import Run, step_metrics, summary_table
from utils import Stopwatch, mixed_seed, read_jsonl, write_jsonl


def test_mixed_seeds_are_stable_and_differ_in_every_argument():
    assert mixed_seed(7, 1) == mixed_seed(7, 1)
    seeds = {mixed_seed(a, b) for a in range(30) for b in range(30)}
    assert len(seeds) == 900
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_json_lines_survive_the_round_trip_and_nan_becomes_null(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": "é\n"}}])
    write_jsonl(path, [{"a": 1}], mode="a")
    assert "NaN" not in path.read_text()
    assert read_jsonl(path) == [
        (1, {"a": None, "b": [None, 1.5], "c": {"d": "é\n"}}),
        (2, {"a": 1}),
    ]


def test_the_stopwatch_adds_up_by_stage_and_waits_for_the_device():
    waits = []
    stopwatch = Stopwatch(lambda: waits.append(time.sleep(0.02)))
    for _ in range(2):
        with stopwatch("policy"):
            pass
    with stopwatch("sampling"):
        pass
    assert len(waits) == 3
    assert stopwatch.seconds["policy"] >= 0.04 > stopwatch.seconds["sampling"] >= 0.02


def test_step_metrics_match_hand_computed_values():
    mask = torch.tensor([[[True, True], [True, False]]])
    rollouts = SimpleNamespace(
        completion_mask=mask,
        logprobs=torch.tensor([[[-1.0, -2.0], [-3.0, 0.0]]]),
        finished=torch.tensor([[False, True]]),
    )
    rewards = SimpleNamespace(
        names=["correctness", "brevity"],
        per_function=torch.tensor([[[2.0, 0.5], [0.0, 0.5]]]),
        total=torch.tensor([[2.5, 0.5]]),
    )
    metrics = step_metrics(7, rollouts, rewards, {"loss": 0.25}, {"sampling": 1.5})
    assert metrics == pytest.approx({
        "step": 7, "reward": 1.5, "reward_std": 2**0.5, "rewards/correctness": 1.0,
        "rewards/brevity": 0.5, "loss": 0.25, "entropy": 2.0, "completion_length": 1.5,
        "truncated": 0.5, "flat_groups": 0.0, "tokens_per_second": 2.0, "seconds/sampling": 1.5,
        "tokens/sampled": 3, "tokens/flat": 0, "tokens/truncated": 2, "completions/sampled": 2,
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
