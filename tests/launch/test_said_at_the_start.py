"""What a run says of data and rewards that are the user's own, and whom its errors blame."""

import json
from dataclasses import replace

import pytest
from conftest import TASK, make_args

import main
from evaluation.reward_lint import is_golden, why_not_golden
from launch.loading import check_data, remarks
from launch.parser import parse_args
from rldatasets import Problem
from utils import UserError, named

TINY = ["--questions_per_step", "2", "--group_size", "3", "--num_train_iters", "1",
        "--eval_problems", "3", "--max_completion_length", "6"]  # fmt: skip


def brevity(completion, problem):
    return float(len(completion) < 10)


@pytest.fixture
def own(tmp_path):
    """The flags of a run on data of one's own, without solutions."""
    rows = [{"question": f"{n} and {n}?", "answer": str(2 * n)} for n in range(30)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--preset", "cpu", "--dataset_path", str(tmp_path / "own.jsonl"), "--output_dir",
            str(tmp_path / "run")]  # fmt: skip


def test_data_without_solutions_has_no_cold_start_and_is_told_so(
    own, saved_models, tmp_path, capsys
):
    (tmp_path / "rewards.py").write_text(
        "def vowels(completion, problem):\n    return 1.0\n\n\nREWARD_FUNCTIONS = [vowels]\n"
    )
    more = ["--evaluator", str(tmp_path / "rewards.py"), "--model_name", str(saved_models["qwen2"])]
    main.train(parse_args([*own, *TINY, *more]))
    said = capsys.readouterr().out
    assert said.count("no cold start: the data has no worked solutions (field `solution`), so "
                      "--cold_start_steps is 0, not 4 as in --preset cpu\n") == 1  # fmt: skip
    assert said.count("accuracy counts what stands in <answer> tags") == 1
    flags = json.loads((tmp_path / "run" / "config.json").read_text())["flags"]
    assert flags["cold_start_steps"] == 0 and "typed" not in flags


def test_a_cold_start_that_was_asked_for_is_an_error(own):
    for more in (["--cold_start_steps", "4"], ["--cold_start_steps=4"]):
        args = parse_args([*own, *more])
        with pytest.raises(UserError, match="--cold_start_steps 4: the data has no worked"):
            check_data(args, [Problem("?", "1", "")], [Problem("?", "1", "")], 1)
    args = parse_args([*own, "--cold_start_steps", "4"])
    check_data(args, [Problem("?", "1", "1")], [Problem("?", "1", "")], 1)
    assert args.cold_start_steps == 4


@pytest.mark.parametrize(
    ("argv", "flag", "said"),
    [
        ([], "group_size", "--group_size 8 (of --preset cpu)"),
        (["--group_size", "8"], "group_size", "--group_size 8"),
        (["--num_chains", "8"], "group_size", "--group_size 8"),
        (["--group_size=8"], "group_size", "--group_size 8"),
        (["--max_draws", "8"], "group_size", "--group_size 8 (of --preset cpu)"),
    ],
)
def test_a_flag_that_nobody_typed_is_the_preset_s(argv, flag, said, tmp_path):
    args = parse_args(["--preset", "cpu", "--output_dir", str(tmp_path / "run"), *argv])
    assert named(args, flag) == said
    assert named(make_args(), flag) == "--group_size 4"  # what is not the command line's


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--group_size", "300"], "--sampling_batch_size 128 (of --preset cpu): less than one"),
        (["--max_completion_length", "9000"],
         "--max_prompt_length 256 (of --preset cpu) + --max_completion_length 9000: above"),
        (["--max_prompt_length", "9000"],
         "--max_prompt_length 9000 + --max_completion_length 48 (of --preset cpu): above"),
        (["--group_size", "300", "--sampling_batch_size", "128"],
         "error: --sampling_batch_size 128: less than one"),
    ],
)  # fmt: skip
def test_errors_blame_the_preset_for_what_is_its(argv, said, tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_args(["--preset", "cpu", "--output_dir", str(tmp_path / "run"), *argv])
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and len(error) <= 201


@pytest.mark.parametrize(
    ("argv", "count", "culprit"),
    [
        ([], 9, "--questions_per_step 8 (of --preset cpu): less than one for each of 9"),
        (["--questions_per_step", "20"], 9, "5 held-out problems: less than one for each of 9"),
        (["--questions_per_step", "20", "--eval_problems", "5"], 9, "--eval_problems 5: less"),
        (["--questions_per_step", "3"], 4, "--questions_per_step 3: less than one for each of 4"),
    ],
)
def test_too_little_for_all_processes_is_blamed_on_what_is_too_little(argv, count, culprit, own):
    problems = [Problem(f"{n}?", str(n), "so") for n in range(30)]
    with pytest.raises(UserError) as raised:
        check_data(parse_args([*own, *argv]), problems, problems[:5], count)
    assert str(raised.value).startswith(culprit)


@pytest.mark.parametrize(
    ("task", "problem", "reason"),
    [
        (TASK, Problem("?", "Paris", ""), "answers are not all numbers, 'Paris'"),
        (
            TASK,
            Problem("?", "7", "", {"target": 7}),
            "problems have a field of their own, `target`",
        ),
        (replace(TASK, is_correct=brevity), Problem("?", "7", ""), "an is_correct of its own"),
        (replace(TASK, system_prompt="Go."), Problem("?", "7", ""), "a SYSTEM_PROMPT of its own"),
        (TASK, Problem("?", "7", ""), None),
    ],
)
def test_the_lint_says_why_it_was_skipped(task, problem, reason):
    problems = [Problem("?", "1,080", ""), problem]
    assert is_golden(task, problems) == (reason is None)
    said = [line for line in remarks(task, problems) if "not linted" in line]
    assert len(said) == (reason is not None)
    assert reason is None or reason in said[0]
    assert why_not_golden(task, problems[:1] if reason and "answers" in reason else []) is None or (
        "own" in reason
    )


def test_what_accuracy_counts_is_said_of_rewards_that_know_no_tags_alone():
    def said(**changes):
        lines = list(remarks(replace(TASK, **changes), []))
        return [line for line in lines if line.startswith("accuracy counts")]

    correctness = TASK.reward_functions[0]
    assert said() == said(reward_functions=[brevity, correctness]) == []
    assert said(reward_functions=[brevity], is_correct=brevity) == []
    [line] = said(reward_functions=[brevity])
    assert "<answer> tags" in line and "is_correct" in line and len(line) <= 200
