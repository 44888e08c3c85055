"""No question that is evaluated is trained on, wherever the two come from."""

import json
from types import SimpleNamespace

import pytest

import main
from launch.loading import check_same_data, held_out_problems, read_problems
from launch.parser import parse_args
from rldatasets import Problem, Problems, arithmetic_problems
from utils import UserError

TINY = [
    "--preset", "cpu", "--questions_per_step", "2", "--group_size", "2", "--num_train_iters", "1",
    "--max_completion_length", "4", "--max_prompt_length", "500", "--cold_start_steps", "0",
]  # fmt: skip


def task_of(train, test):
    """A task with these questions."""
    splits = {
        name: Problems([Problem(question, "1", "") for question in questions], 0)
        for name, questions in (("train", train), ("test", test))
    }
    return SimpleNamespace(together=1, game=None, problems=splits.__getitem__)


def flags(eval_problems=0, dataset_name="gsm8k", dataset_path=None):
    return SimpleNamespace(
        eval_problems=eval_problems, dataset_name=dataset_name, dataset_path=dataset_path
    )


def questions(problems):
    return [problem.question for problem in problems]


@pytest.mark.parametrize(
    "writing", ["a b?", "A B?", " a  b? ", "a\nb?", "\uff21 b?", "a\u00a0b?", "a\u2003B\uff1f"]
)
def test_a_question_of_the_test_split_is_not_trained_on_however_it_is_written(writing, capsys):
    train, test, counts = read_problems(flags(), task_of(["x?", writing, "y?"], ["a b?", "z?"]))
    assert questions(train) == ["x?", "y?"] and questions(test) == ["a b?", "z?"]
    assert counts == {"overlap": 1, "train_repeats": 0, "test_repeats": 0}
    said = capsys.readouterr()
    assert said.out == "1 of 3 training questions left out: they are in the test split too\n"
    assert said.err == ""


def test_questions_that_stand_there_twice_are_counted_and_told(capsys):
    task = task_of(["x?", "X?", "y?"], ["a?", "A ?", "a?", "A?", "b?"])
    train, test, counts = read_problems(flags(), task)
    assert (len(train), len(test)) == (3, 5)
    assert counts == {"overlap": 0, "train_repeats": 1, "test_repeats": 2}
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert "warning: 2 of 5 held-out questions" in said.err


def test_nothing_is_said_of_data_that_is_in_order(capsys):
    _, _, counts = read_problems(flags(), task_of(["a?", "b?"], ["c?"]))
    assert counts == {"overlap": 0, "train_repeats": 0, "test_repeats": 0}
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("args", "named"),
    [(flags(), "--dataset_name gsm8k: "), (flags(dataset_path="d"), "--dataset_path d: ")],
)
def test_data_that_leaves_nothing_to_train_on_is_one_line(args, named):
    with pytest.raises(UserError, match=f"{named}all 2 training questions are in the test split"):
        read_problems(args, task_of(["a?", "B?"], ["A?", "b?", "c?"]))


def test_fewer_held_out_problems_are_a_shuffle_of_the_split_and_among_more():
    test = task_of([], [f"{n}?" for n in range(200)]).problems("test")
    ten, forty = (questions(held_out_problems(flags(n), test)) for n in (10, 40))
    assert ten != questions(test[:10]) and max(int(q[:-1]) for q in ten) > 100
    assert set(ten) < set(forty) and len(set(forty)) == 40
    assert forty == sorted(forty, key=lambda question: int(question[:-1]))
    for count in (0, 200, 300):
        assert questions(held_out_problems(flags(count), test)) == questions(test[:200])


def test_the_seed_does_not_choose_them():
    tests = [Problems([Problem(f"{n}?", "1", "") for n in range(50)], seed) for seed in (1, 2)]
    one, other = (held_out_problems(flags(9), test) for test in tests)
    assert one == other


def test_arithmetic_is_made_in_random_order_and_its_first_problems_stay_what_they_were():
    test = Problems(arithmetic_problems("test", 3), 3)
    assert held_out_problems(flags(512, "arithmetic"), test) == test[:512]


def test_a_run_begun_before_there_was_a_shuffle_goes_on_with_its_first_problems():
    test = task_of([], [f"{n}?" for n in range(50)]).problems("test")
    before = SimpleNamespace(data={"problems_sha256": "a"}, path="x")
    since = SimpleNamespace(data={"problems_sha256": "a", "overlap": 0}, path="x")
    assert held_out_problems(flags(5), test, before) == test[:5]
    assert held_out_problems(flags(5), test, since) == held_out_problems(flags(5), test)
    check_same_data({"problems_sha256": "a", "overlap": 3, "test_repeats": 1}, before)
    with pytest.raises(UserError, match="other problems"):
        check_same_data({"problems_sha256": "a", "overlap": 3}, since)


def write(folder, **splits):
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_a_run_says_so_and_keeps_the_counts_in_its_config(saved_models, tmp_path, capsys):
    rows = [{"question": f"What is {n} + {n}?", "answer": 2 * n} for n in range(30)]
    copies = [{**row, "question": row["question"].upper()} for row in rows[:7]]
    write(tmp_path, train=rows, test=[*copies, rows[0]])
    argv = [*TINY, "--dataset_path", str(tmp_path), "--model_name", str(saved_models["qwen2"]),
            "--output_dir", str(tmp_path / "run")]  # fmt: skip
    main.train(parse_args(argv))
    said = capsys.readouterr()
    assert "7 of 30 training questions left out: they are in the test split too" in said.out
    assert "1 of 8 held-out questions" in said.err
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    expected = {"train_problems": 23, "overlap": 7, "train_repeats": 0, "test_repeats": 1}
    assert {name: config[name] for name in expected} == expected


def test_a_directory_whose_splits_are_one_file_is_refused(saved_models, tmp_path, capsys):
    rows = [{"question": f"What is {n} + {n}?", "answer": 2 * n} for n in range(30)]
    write(tmp_path, train=rows, test=rows)
    argv = [*TINY, "--dataset_path", str(tmp_path), "--model_name", str(saved_models["qwen2"]),
            "--output_dir", str(tmp_path / "run")]  # fmt: skip
    with pytest.raises(UserError, match="all 30 training questions are in the test split too"):
        main.train(parse_args(argv))
    assert not (tmp_path / "run").exists()
