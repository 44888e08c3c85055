"""What a line of data says is what is learnt from: its digits, its gold line, each key once."""

import json
import re

import pytest

import evaluator
from rldatasets import Problem, fingerprint, is_held_out, load_problems, normal
from utils import UserError, read_jsonl


def read(folder, *lines):
    """The problems of these lines of train.jsonl."""
    (folder / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return [*load_problems("gsm8k", folder, "train", 0)]


@pytest.mark.parametrize(
    "digits",
    [
        "0.000002", "2e-06", "1e+16", "10000000000000000", "1.10", "0.10", "3.0", "1E5", "-0.0",
        "-7", "0.1234567890123456789012345", "1" + 20 * "0", "12345678901234567890123", "72",
    ],
)  # fmt: skip
def test_a_number_keeps_the_digits_that_stand_in_the_file(tmp_path, digits):
    [problem] = read(tmp_path, f'{{"question": "Which?", "answer": {digits}}}')
    assert problem.answer == digits


@pytest.mark.parametrize("digits", ["0.000002", "10000000000000000", "1.10", "-7", "1" + 20 * "0"])
def test_the_right_answer_to_a_number_is_right(tmp_path, digits):
    [problem] = read(tmp_path, f'{{"question": "Which?", "answer": {digits}}}')
    assert evaluator.is_correct(f"<answer>\n{digits}\n</answer>", problem)


def test_other_numbers_stay_numbers_for_the_rewards(tmp_path):
    [problem] = read(tmp_path, '{"question": "q", "answer": 1.50, "level": 3, "odds": [0.5, 1e3]}')
    assert problem.extra == {"level": 3, "odds": [0.5, 1000.0]}


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "true", "[1]", "{}"])
def test_what_is_no_finite_number_is_no_answer(tmp_path, value):
    with pytest.raises(
        UserError, match=r"train.jsonl:1: `answer` is .*; expected text or a finite"
    ):
        read(tmp_path, f'{{"question": "q", "answer": {value}}}')


def test_a_number_too_long_for_python_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"train.jsonl:1: not JSON"):
        read(tmp_path, f'{{"question": "q", "answer": {"9" * 5000}}}')


@pytest.mark.parametrize(
    ("answer", "gold", "solution"),
    [
        ("It is 7.\n#### 7\nThe answer is: 7", "7", "It is 7."),
        ("a\n#### 1,080\n\nDone.\n", "1,080", "a"), ("#### 72", "72", ""),
        ("a #### 5\r\nChecked.", "5", "a"), ("a\n####\n 12 \nrest", "12", "a"),
        ("first\n#### 1\nno:\n#### 2\nso", "2", "first\n#### 1\nno:"),
    ],
)  # fmt: skip
def test_the_gold_answer_is_the_line_that_it_is_marked_on(tmp_path, answer, gold, solution):
    [problem] = read(tmp_path, json.dumps({"question": "q", "answer": answer}))
    assert (problem.answer, problem.solution) == (gold, solution)


def test_an_answer_without_a_mark_is_whole(tmp_path):
    [problem] = read(tmp_path, json.dumps({"question": "q", "answer": "x = 1\ny = 2"}))
    assert problem.answer == "x = 1\ny = 2"


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ('{"question": "q", "answer": "1", "answer": "2"}', "answer"),
        ('{"question": "q", "question": "q", "answer": "1"}', "question"),
        ('{"question": "q", "answer": 1, "meta": {"a": 1, "a": 1}}', "a"),
        ('{"question": "q", "answer": 1, "tags": [{"é": 1, "\\u00e9": 2}]}', "é"),
        ('{"": 1, "": 2, "question": "q", "answer": 1}', ""),
    ],
)
def test_a_key_given_twice_is_refused_by_file_and_line(tmp_path, row, key):
    first = '{"question": "p", "answer": "1"}'
    with pytest.raises(UserError, match=re.escape(f"train.jsonl:3: `{key}` is given twice; leave")):
        read(tmp_path, first, "", row)


def test_only_the_fields_that_are_asked_for_are_as_written(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1.10, "b": 1.10}\n{"b": 2}\n')
    assert [row for _, row in read_jsonl(path)] == [{"a": 1.1, "b": 1.1}, {"b": 2}]
    rows = [row for _, row in read_jsonl(path, as_written=("a",))]
    assert rows == [{"a": "1.10", "b": 1.1}, {"b": 2}]


# --- writings of one question ------------------------------------------------------------------

WRITINGS = [
    "How many are 2 apples?", "how many are 2 APPLES?", "  How many\tare 2\napples? ",
    "How\u00a0many are 2 apples?", "\uff28ow many are \uff12 apples?", "How many are  2 apples?",
]  # fmt: skip


def test_white_space_case_and_compatible_characters_do_not_make_a_question_another():
    assert len({normal(writing) for writing in WRITINGS}) == 1
    assert normal("Straße 5") == normal("STRASSE 5") and normal("e\u0301") == normal("\u00c9")
    apart = ["Add 1 2", "Add 12", "Add 1 + 2", "Add 1 - 2", "Add 1 2?"]
    assert len({normal(writing) for writing in apart}) == len(apart)


def test_writings_of_one_question_are_in_one_split(tmp_path):
    rows = [
        {"question": writing.replace("2", str(n)), "answer": n}
        for n in range(3, 40)
        for writing in WRITINGS
    ]
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    train, test = (load_problems("gsm8k", path, split, 0) for split in ("train", "test"))
    assert len(train) + len(test) == len(rows) and len(test) > 0
    assert not {normal(p.question) for p in train} & {normal(p.question) for p in test}


def test_what_arithmetic_and_the_official_files_are_is_what_it_was(gsm8k):
    """Runs of before find their problems again."""
    assert [n for n in range(40) if is_held_out(f"{n}+1")] == [5, 11, 12, 15, 16, 26, 32, 38, 39]
    for split, start in GSM8K_SHA256.items():
        assert fingerprint([*load_problems("gsm8k", gsm8k, split, 0)])[:16] == start
    for split, start in ARITHMETIC_SHA256.items():
        assert fingerprint([*load_problems("arithmetic", None, split, 7)])[:16] == start
    assert fingerprint([Problem("q", "1", "")])[:4] == "f3c1"


GSM8K_SHA256 = {"train": "ebbb337cb725ecd4", "test": "c035bf1a0ac1cad8"}
ARITHMETIC_SHA256 = {"train": "7947c5acc6df0f7e", "test": "ca6b8b6626f6dfa3"}


def test_a_file_without_such_writings_is_split_as_it_always_was(tmp_path):
    rows = [{"question": f"Word {n}?", "answer": n} for n in range(60)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    test = load_problems("gsm8k", tmp_path / "own.jsonl", "test", 0)
    assert [p.question for p in test] == [
        row["question"] for row in rows if is_held_out(row["question"])
    ]
