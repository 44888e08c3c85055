"""Seeds, JSON lines, the stopwatch and the run's files."""

import time

from training.progress import Stopwatch
from utils import mixed_seed, read_jsonl, write_jsonl


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
