"""Each alarm on a history in which it was planted, and none on healthy ones."""

import json
import math

import pytest

from records.alarms import QUIET, WINDOW, new_alarms
from records.files import Series
from records.run import Run

# A run of the demo, seed 7111994, as it was: what a healthy run looks like.
DEMO = {
    "reward": [1.85, 2.09, 2.06, 2.45, 2.48, 2.71, 3.1, 3.16, 2.93, 2.98, 2.65, 2.97, 3.26, 2.83,
               3.07, 2.38, 3.53, 3.57, 3.28, 3.16],
    "entropy": [0.927, 0.916, 0.63, 0.232, 0.624, 0.167, 0.23, 0.0823, 0.0601, 0.101, 0.088, 0.074,
                0.126, 0.111, 0.136, 0.0692, 0.0462, 0.0584, 0.101, 0.0322],
    "completion_length": [35, 32.5, 32.7, 30.1, 32, 30.8, 30.7, 31, 30.8, 31.9, 31.4, 31.5, 31.9,
                          31.6, 32.5, 30.5, 31.5, 31.1, 31.9, 31],
    "truncated": [0.203, 0.172, 0.0938, 0.0156, 0.109, 0.0312, 0.0469, 0.0312, 0, 0.0312, 0.0156,
                  0.0156, 0.0312, 0.0312, 0.0312, 0, 0, 0, 0.0469, 0],
    "flat_groups": [0, 0, 0, 0, 0, 0.125, 0.125, 0.5, 0.375, 0.375, 0.125, 0.5, 0.5, 0.375, 0.375,
                    0.25, 0.125, 0.25, 0.25, 0.375],
}  # fmt: skip


def evaluated(step, accuracy, margin=0.04):
    return {"step": step, "accuracy": accuracy, "accuracy_low": accuracy - margin,
            "accuracy_high": accuracy + margin}  # fmt: skip


def history(steps=60, **changes):
    """A healthy run that learns little; `changes` map a key to a function of the step."""
    healthy = {
        "reward": lambda step: 2.5 + 0.2 * math.sin(step * 1.7),
        "entropy": lambda step: 0.3 + 0.05 * math.sin(step),
        "kl": lambda step: min(0.2, step / 100),
        "completion_length": lambda step: 200 + 10 * math.cos(step),
        "truncated": lambda step: 0.05,
        "flat_groups": lambda step: 0.3 + 0.2 * (step % 3),
        "skipped": lambda step: 0.0,
    }
    values = {**healthy, **changes}
    return [{"step": s, **{k: value(s) for k, value in values.items()}} for s in range(steps)]


def told(rows, evaluations=()):
    """(step, line) of every alarm while the run goes on."""
    return [
        (rows[n]["step"], line)
        for n in range(len(rows))
        for kind in ("step", "eval")
        for line in new_alarms(rows[: n + 1], list(evaluations), kind)
    ]


def test_a_healthy_run_raises_none():
    rising = [evaluated(step, 0.5 + step / 300) for step in range(0, 61, 20)]
    assert told(history(), rising) == []


def test_the_demo_s_own_numbers_raise_none():
    rows = [{"step": s, **{k: values[s] for k, values in DEMO.items()}} for s in range(20)]
    assert told(rows, [evaluated(0, 0.5), evaluated(20, 0.63)]) == []


@pytest.mark.parametrize(
    ("key", "planted", "step", "says"),
    [
        ("entropy", lambda s: 0.3 * math.exp(-s / 8), 30, "nats per token"),
        ("kl", lambda s: 0.1 if s < 30 else 4.0, 31, "1.66 nats per token: the policy has left"),
        ("completion_length", lambda s: 200 if s < 30 else 900, 31, "200 tokens at first, 480 now"),
        ("completion_length", lambda s: 200 if s < 30 else 4, 32, "200 tokens at first, 82 now"),
        ("flat_groups", lambda s: 0.3 if s < 30 else 1.0, 33, "86% of the groups"),
        ("truncated", lambda s: 0.1 if s < 30 else 0.9, 32, "58% of the completions were cut off"),
        ("truncated", lambda s: 1.0, 0, "raise --max_completion_length"),
        ("flat_groups", lambda s: 1.0, 0, "100% of the groups"),
        ("skipped", lambda s: float(s >= 30), 30, "not finite"),
    ],
)
def test_what_goes_wrong_is_told_once_when_it_happens(key, planted, step, says):
    [(when, line)] = told(history(**{key: planted}))
    assert when == step
    assert line.startswith(f"{key}: ") and says in line
    assert line.endswith(f"; see completions/step_{step:05d}.jsonl")


@pytest.mark.parametrize(
    ("end", "hacked"), [(0.5, True), (0.45, True), (0.505, True), (0.6, False)]
)
def test_a_reward_that_rises_without_held_out_accuracy_is_hacking(end, hacked):
    rows = history(reward=lambda s: 2.5 + s / 40 + 0.1 * (s % 2))
    lines = told(rows, [evaluated(0, 0.5), evaluated(40, end)])
    if not hacked:
        assert lines == []
        return
    [(step, line)] = lines
    assert step == 39
    assert line.startswith(f"reward_hacking: reward 2.59 -> 3.49 while held-out accuracy 50.0% -> "
                           f"{end:.1%}")  # fmt: skip
    assert line.endswith("see completions/eval_00040.jsonl")


def test_a_reward_that_only_fluctuates_is_no_hacking():
    flat = [evaluated(step, 0.5) for step in range(0, 61, 10)]
    assert told(history(reward=lambda s: 2.5 + s / 400 + 0.4 * math.sin(s * 2.3)), flat) == []


def test_hacking_is_measured_from_the_best_evaluation_on():
    """Accuracy rises at first, then falls, while the reward goes on rising."""
    rows = history(reward=lambda s: 2.5 + s / 40 + 0.1 * (s % 2))
    lines = told(rows, [evaluated(0, 0.3), evaluated(20, 0.5), evaluated(40, 0.48)])
    assert [line.partition(":")[0] for _, line in lines] == ["reward_hacking"]
    assert "50.0% -> 48.0%" in lines[0][1]


def test_accuracy_below_the_interval_of_the_best_is_told():
    lines = told(history(), [evaluated(0, 0.6), evaluated(20, 0.57), evaluated(40, 0.51)])
    [(step, line)] = lines
    assert step == 39
    assert line.startswith("accuracy: held-out accuracy fell from 60.0% (step 0) to 51.0%")


def test_what_comes_back_after_a_quiet_time_is_told_again():
    def planted(step):
        return 5.0 if step in (10, 12, 15, 60) else 0.0

    steps = [step for step, _ in told(history(80, kl=lambda s: planted(s) * WINDOW))]
    assert steps == [10, 60] and QUIET < 60 - 15


def test_values_that_are_missing_prove_nothing(tmp_path):
    rows = history(kl=lambda s: None, entropy=lambda s: None, reward=lambda s: None)
    assert told(rows, [evaluated(0, 0.5), evaluated(40, 0.5)]) == []
    run = Run(tmp_path)
    for row in history(3, kl=lambda s: math.nan, truncated=lambda s: 1.0):
        run.log_step(row)
    logged = [json.loads(line)["alarms"] for line in (tmp_path / "metrics.jsonl").open()]
    assert [len(lines) for lines in logged] == [1, 0, 0]


def test_the_evaluation_after_the_last_step_raises_its_alarm_too(tmp_path, capsys):
    run = Run(tmp_path)
    for step in range(3):
        run.log_step({"step": step, "reward": 1.0})
    for step, share in ((0, 0.8), (3, 0.5)):
        run.log_evaluation(
            step, {k: v for k, v in evaluated(step, share).items() if k != "step"}, []
        )
    assert "step 3: alarm: accuracy: held-out accuracy fell" in capsys.readouterr().out
    assert [step for step, _ in Series(tmp_path).alarms] == [3]
    again = Run(tmp_path)
    again.cut_back(3)
    assert "alarms" not in again.last_evaluation


def test_a_resumed_run_knows_what_was_told_and_reads_no_file_at_every_step(tmp_path, monkeypatch):
    rows = history(4, truncated=lambda s: 1.0)
    for row in rows[:2]:
        (run := Run(tmp_path)).cut_back(row["step"])
        run.log_step(row)
    run = Run(tmp_path)
    run.cut_back(2)
    monkeypatch.setattr("records.run.read_rows", None)
    monkeypatch.setattr("records.run.read_jsonl", None)
    for row in rows[2:]:
        run.log_step(row)
    logged = [json.loads(line)["alarms"] for line in (tmp_path / "metrics.jsonl").open()]
    assert [len(lines) for lines in logged] == [1, 0, 0, 0]


def played(step, exploitability):
    return {"step": step, "exploitability": exploitability}


def test_self_play_that_locks_in_is_told():
    """Worse than at first, or with all groups flat; not where exploitability wanders a little."""
    rows = history(20, flat_groups=lambda step: 0.3)
    assert new_alarms(rows, [played(0, 0.34), played(20, 0.37)], "eval") == []
    [line] = new_alarms(rows, [played(0, 0.34), played(20, 0.83)], "eval")
    assert line.startswith("locked_in: self-play: exploitability 0.340 at first, 0.830 now")
    assert line.endswith("see completions/eval_00020.jsonl")
    flat = history(20, flat_groups=lambda step: 1.0)
    [line] = new_alarms(flat[:1], [played(0, 0.34)], "eval")
    assert "100% of the groups flat" in line
    assert new_alarms(flat, [{"step": 20, "accuracy": 0.5}], "eval") == []
    assert new_alarms(flat, [played(0, 0.34), played(20, 0.01)], "eval") == []  # it is learnt
