"""What `--resume` finds, keeps and refuses."""

import json
from types import SimpleNamespace

import pytest

from records.resuming import check_same_flags, steps_with_other_rewards
from records.run import REWARDS_CHANGED, Run
from utils import UserError

SOURCES = {"rewards_sha256": "a", "verdict_sha256": "b"}


def saved(run):
    return json.loads((run.path / "config.json").read_text())


def start(path, command, monkeypatch, before=None, step=0, **facts):
    run = Run(path)
    monkeypatch.setattr("sys.argv", command.split())
    run.save_config(SimpleNamespace(seed=1), "cpu", before, step, **facts)
    return run


def test_the_first_command_stays_and_every_start_is_kept(tmp_path, monkeypatch):
    first = saved(start(tmp_path, "main.py --seed 1", monkeypatch))
    second = saved(start(tmp_path, "main.py --resume", monkeypatch, first, step=3))
    third = saved(start(tmp_path, "main.py --resume --verbose", monkeypatch, second, step=5))
    for config in (second, third):
        assert {k: config[k] for k in ("command", "commit", "started")} == {
            k: first[k] for k in ("command", "commit", "started")
        }
    assert [(row["command"], row["step"]) for row in third["starts"]] == [
        ("python main.py --seed 1", 0),
        ("python main.py --resume", 3),
        ("python main.py --resume --verbose", 5),
    ]


def test_a_run_of_before_there_were_starts_goes_on(tmp_path, monkeypatch):
    before = {"command": "python main.py", "commit": None, "started": "long ago", "flags": {}}
    config = saved(start(tmp_path, "main.py --resume", monkeypatch, before, step=2))
    assert config["command"] == "python main.py"
    assert config["starts"][0]["started"] == "long ago"
    assert len(config["starts"]) == 2


def test_rewards_that_were_edited_are_refused_unless_allowed():
    assert steps_with_other_rewards({}, SOURCES, 3, False) == []  # a run of before
    assert steps_with_other_rewards(SOURCES, SOURCES, 3, False) == []
    for changed in ({"rewards_sha256": "x"}, {"verdict_sha256": "x"}):
        with pytest.raises(UserError, match="--allow_changed_rewards"):
            steps_with_other_rewards({**SOURCES, **changed}, SOURCES, 3, False)
        assert steps_with_other_rewards({**SOURCES, **changed}, SOURCES, 3, True) == [3]
    twice = {"rewards_sha256": "x", "rewards_changed_at": [1]}
    assert steps_with_other_rewards(twice, SOURCES, 3, True) == [1, 3]


def test_the_step_from_which_rewards_are_others_says_so(tmp_path, monkeypatch):
    run = start(tmp_path, "main.py", monkeypatch, rewards_changed_at=[1])
    for step in range(3):
        run.log_step({"step": step, "reward": 1.0})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["alarms"] for row in rows] == [[], [REWARDS_CHANGED], []]


@pytest.mark.parametrize(
    "name", ["my_notes.jsonl", "step_two.jsonl", "eval_.jsonl", "step_1.jsonl", "old_00009.jsonl"]
)
def test_a_file_of_one_s_own_in_completions_is_left_alone(name, tmp_path):
    run = Run(tmp_path)
    for file in (name, "step_00001.jsonl", "step_00004.jsonl", "tokens_00007.jsonl"):
        (run.completions / file).write_text("{}\n")
    run.cut_back(3)
    assert {path.name for path in run.completions.iterdir()} == {name, "step_00001.jsonl"}


def test_steps_that_are_made_again_have_the_rewards_of_now():
    changed = {**SOURCES, "rewards_changed_at": [2, 6]}
    assert steps_with_other_rewards(changed, SOURCES, 4, False) == [2, 4]
    assert steps_with_other_rewards(changed, SOURCES, 6, False) == [2, 6]
    assert steps_with_other_rewards(changed, SOURCES, 2, False) == [2]
    other = {**changed, "rewards_sha256": "c"}
    assert steps_with_other_rewards(other, SOURCES, 4, True) == [2, 4]


def test_data_may_have_moved_or_be_of_another_form_for_its_content_is_compared():
    saved = {"dataset_path": "a.parquet", "question_field": None, "seed": 1}
    args = SimpleNamespace(dataset_path="b.csv", question_field="q", seed=1)
    check_same_flags(args, saved)
    args.seed = 2
    with pytest.raises(UserError, match=r"the run has other flags: --seed \(was 1\); leave"):
        check_same_flags(args, saved)
