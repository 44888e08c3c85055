"""Problems, their split, their order, and what bad files are told."""

import json
import re

import pytest

import evaluator
from rldatasets import (
    DIFFICULTIES,
    NAMES,
    THINGS,
    Problem,
    Problems,
    arithmetic_problems,
    load_problems,
    worked_answer,
)
from utils import UserError

NUMBERED = [Problem(f"question {i}", str(i), "") for i in range(10)]


def drawn(problems, steps, size):
    return [[int(p.answer) for p in problems.batch(step, size)] for step in steps]


def test_every_epoch_holds_each_problem_once_in_a_new_order():
    batches = drawn(Problems(NUMBERED, seed=1), range(10), 3)  # 30 draws: three epochs of ten
    flat = sum(batches, [])
    epochs = [flat[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, tuple(range(10))]}) == 4


def test_a_batch_is_a_function_of_seed_and_step_alone():
    first = drawn(Problems(NUMBERED, seed=1), range(8), 3)
    again = Problems(NUMBERED, seed=1)
    assert drawn(again, [5], 3) == [first[5]]
    assert drawn(again, range(8), 3) == first
    assert drawn(Problems(NUMBERED, seed=2), range(8), 3) != first


def test_the_data_never_runs_out_and_a_batch_may_exceed_it():
    problems = Problems(NUMBERED, seed=1)
    assert len(problems.batch(10_000, 4)) == 4
    assert sorted(int(p.answer) for p in problems.batch(0, 20)) == sorted([*range(10)] * 2)


def test_the_cold_start_s_steps_come_before_step_zero():
    problems = Problems(NUMBERED, seed=1)
    before, after = drawn(problems, [-2, -1], 5), drawn(problems, [0, 1], 5)
    assert sorted(sum(before, [])) == list(range(10))
    assert before != after


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_arithmetic_answers_are_right_and_solutions_lead_to_them(difficulty):
    for problem in arithmetic_problems("train", 3, difficulty)[:500]:
        total = None
        for line in problem.solution.split("\n"):
            left, operation, right, result = re.fullmatch(
                r"(\d+) ([-+*]) (\d+) = (\d+)", line
            ).groups()
            assert total is None or int(left) == total
            calculate = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[operation]
            total = calculate(int(left), int(right))
            assert total == int(result) >= 0
            # every number of the calculation is in the story, but for intermediate results
            assert re.search(rf"\b{right}\b", problem.question)
        assert str(total) == problem.answer


def calculations(problems):
    """What each problem calculates, 7 + 5 and 5 + 7 being the same."""
    return {
        tuple(
            tuple(sorted(re.findall(r"\d+", line)) if "-" not in line else line.split())
            for line in problem.solution.split("\n")
        )
        for problem in problems
    }


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_arithmetic_test_problems_ask_for_calculations_that_training_never_shows(difficulty):
    train = arithmetic_problems("train", 1, difficulty)
    test = arithmetic_problems("test", 1, difficulty)
    assert (len(train), len(test)) == (4096, 1024)
    assert len({p.question for p in train + test}) == 4096 + 1024
    assert not calculations(train) & calculations(test)
    assert not calculations(arithmetic_problems("train", 2, difficulty)) & calculations(test)


def test_arithmetic_is_seeded_and_the_held_out_problems_are_the_same_for_every_seed():
    assert arithmetic_problems("train", 1) == arithmetic_problems("train", 1)
    assert arithmetic_problems("train", 1) != arithmetic_problems("train", 2)
    assert arithmetic_problems("test", 1) == arithmetic_problems("test", 2)


def test_arithmetic_uses_several_templates():
    blanks = r"\d+|" + "|".join([*NAMES, *THINGS])
    stories = {re.sub(blanks, "_", p.question) for p in arithmetic_problems("train", 1)}
    assert len(stories) == 8


def test_gsm8k_is_read_from_the_official_files(gsm8k):
    train = load_problems("gsm8k", gsm8k, "train", 0)
    test = load_problems("gsm8k", gsm8k, "test", 0)
    assert (len(train), len(test)) == (7473, 1319)
    assert not {p.question for p in train} & {p.question for p in test}
    first = train[0]
    assert first.question.startswith("Natalia sold clips to 48 of her friends in April")
    assert first.answer == "72"
    assert first.solution == (
        "Natalia sold 48/2 = 24 clips in May.\n"
        "Natalia sold 48+24 = 72 clips altogether in April and May."
    )


def test_every_gsm8k_gold_parses_and_its_worked_answer_is_correct(gsm8k):
    for split in ("train", "test"):
        for problem in load_problems("gsm8k", gsm8k, split, 0):
            assert evaluator.parse_number(problem.answer) is not None
            assert evaluator.is_correct(worked_answer(problem), problem)
            assert evaluator.is_correct_leniently(f"It is {problem.answer}.", problem)


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_one_s_own_file_is_split_by_question_without_overlap(tmp_path):
    rows = [{"question": f"What is {i} - 1?", "answer": i - 1} for i in range(1, 51)]
    path = write(tmp_path / "own.jsonl", *rows)
    train, test = (load_problems("gsm8k", path, split, 0) for split in ("train", "test"))
    assert len(train) + len(test) == 50
    assert 3 < len(test) < 20
    assert not {p.question for p in train} & {p.question for p in test}
    assert all(int(p.question.split()[2]) - 1 == int(p.answer) for p in train)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"question": "a", "answer": "1"', "not JSON"),
        ('["question"]', "expected an object"),
        ({"question": "a"}, "`answer` is missing or empty"),
        ({"question": " ", "answer": "1"}, "`question` is missing or empty"),
        ({"question": "a", "answer": None}, "`answer` is missing or empty"),
        ({"question": "a", "answer": "so it is ####"}, "nothing after ####"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path, row, reason):
    path = write(tmp_path / "own.jsonl", {"question": "a", "answer": "1"}, "", row)
    with pytest.raises(UserError, match=re.escape(f"{path}:3: {reason}")):
        load_problems("gsm8k", path, "train", 0)


def test_a_split_without_problems_is_an_error(tmp_path):
    path = write(tmp_path / "own.jsonl")
    with pytest.raises(UserError, match="no problems in its train split"):
        load_problems("gsm8k", path, "train", 0)
