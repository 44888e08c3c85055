"""Multiple choice: every form of choices reaches the prompt, and the gold is the label."""

import json

import pytest

from reading.choices import choice_columns
from rldatasets import load_problems
from utils import UserError


def problems_of(folder, *rows, form="jsonl"):
    """The problems of these rows, of which a test split has the same."""
    for split in ("train", "test"):
        text = rows[0] if form == "csv" else "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.{form}").write_text(text)
    return load_problems("gsm8k", folder, "train", 0)


def one(folder, *rows, **form):
    problem = problems_of(folder, *rows, **form)[0]
    return problem.question.removeprefix("Which?\n"), problem.answer


@pytest.mark.parametrize(
    "choices",
    [
        {"options": {"A": "x", "B": "y", "C": None}},  # as Arrow fills structs
        {"choices": ["x", "y", None]},
        {"options": [{"key": "A", "value": "x"}, {"key": "B", "value": "y"}]},
        {"choices": [{"label": "A", "text": "x"}, {"label": "B", "text": "y"}]},
        {"choices": [{"text": "x"}, {"text": "y"}]},
        {"choices": {"label": ["A", "B"], "text": ["x", "y"]}},
        {"choices": {"key": ["A", "B"], "value": ["x", "y"]}},
        {"options": [["A", "x"], ["B", "y"]]},  # as Arrow reads maps
        {"choices": '["x", "y"]'}, {"choices": "['x', 'y']"}, {"options": "{'A': 'x', 'B': 'y'}"},
        {"A": "x", "B": "y", "C": "", "D": None}, {"option_a": "x", "option_b": "y"},
        {"OptionA": "x", "OptionB": "y"}, {"Choice A": "x", "Choice B": "y"},
    ],
)  # fmt: skip
@pytest.mark.parametrize("answer", ["B", "b", "(B)", "B.", "B) y", "y", "Y", r"\text{B}"])
def test_every_form_of_choices_and_of_answers_is_read(choices, answer, tmp_path):
    row = {"question": "Which?", **choices, "answer": answer}
    assert one(tmp_path, row) == ("A. x\nB. y", "B")
    assert "choices from `" in problems_of(tmp_path, row).taken


def test_columns_that_are_numbered_count_as_they_do(tmp_path):
    row = {"question": "Which?", "option_1": "x", "option_2": "y", "answer": 2}
    assert one(tmp_path, row) == ("1. x\n2. y", "2")


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["question", "A", "B", "C"], ("A", "B", "C")), (["choices", "A", "B"], ("choices",)),
        (["B", "A"], ("A", "B")), (["a", "b"], ()), (["Q", "A"], ()), (["A", "C"], ()),
        (["option1", "option2"], ("option1", "option2")), (["option0", "option2"], ()),
        ([f"choice_{n}" for n in range(12)], tuple(f"choice_{n}" for n in range(12))),
    ],
)  # fmt: skip
def test_columns_for_each_choice_are_a_series(names, found):
    assert choice_columns(names) == found


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([{"question": "What is A+B?", "A": 1, "B": 9, "answer": 10}], "1 has there what is no te"),
        ([{"question": "Which is larger?", "A": 3, "B": 9, "answer": 9}], "1 has there what is no"),
        ([{"question": "q", "A": 3.5, "B": None, "answer": "B"}], "1 has there what is no text"),
        ([{"question": "q", "A": "x", "B": "y", "answer": "A"},
          {"question": "What is A+B?", "A": "1", "B": "9", "answer": "10"}],
         "2 has an answer that is none of them"),
        ([{"question": "q", "A": "x", "B": "", "answer": "A"}], "1 has one choice there, or more"),
        ([{"question": "q", "A": "x", "B": "", "C": "z", "answer": "B"}], "1 has an answer that"),
    ],
)  # fmt: skip
def test_columns_that_are_called_like_a_series_and_hold_no_choices_are_told(rows, why, tmp_path):
    problems = problems_of(tmp_path, *rows)
    for problem, row in zip(problems, rows):
        assert (problem.question, problem.answer) == (row["question"], str(row["answer"]))
        assert problem.extra == {name: row[name] for name in "ABC" if name in row}
    assert f"nothing from `A`, `B`{', `C`' * ('C' in rows[0])}, for " in problems.taken
    assert f"train.jsonl:{why}" in problems.taken


def test_a_number_beside_what_is_no_series_of_choices_keeps_its_digits(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(
            '{"question": "A+B?", "A": 1, "B": 0.10, "answer": 1.10}'
        )
    assert load_problems("gsm8k", tmp_path, "train", 0)[0].answer == "1.10"


def test_rows_of_a_series_that_have_no_choices_have_answers_of_their_own(tmp_path):
    rows = [{"question": "q", "A": "x", "B": "y", "answer": "B"},
            {"question": "How many?", "A": None, "B": float("nan"), "answer": "7"}]  # fmt: skip
    assert [problem.answer for problem in problems_of(tmp_path, *rows)] == ["B", "7"]


NUMBERED = [
    lambda *texts: {f"choice{n}": text for n, text in enumerate(texts, 1)},  # as in COPA
    lambda *texts: {f"option_{n}": text for n, text in enumerate(texts, 1)},
    lambda *texts: {"choices": {"text": texts, "label": [str(n + 1) for n in range(len(texts))]}},
]


@pytest.mark.parametrize("numbered", NUMBERED)
@pytest.mark.parametrize(
    ("answers", "golds"),
    [
        ([0, 1, 2, 3], ["1", "2", "3", "4"]), ([1, 0], ["2", "1"]), (["1.0", "0.0"], ["2", "1"]),
        ([1, 2, 3, 4], ["1", "2", "3", "4"]), ([1, 4], ["1", "4"]),
    ],
)  # fmt: skip
def test_the_table_tells_whether_numbers_are_labels_or_count_from_0(
    numbered, answers, golds, tmp_path
):
    row = {"question": "Which?", **numbered("w", "x", "y", "z")}
    problems = problems_of(tmp_path, *({**row, "answer": answer} for answer in answers))
    assert [problem.answer for problem in problems] == golds


@pytest.mark.parametrize("numbered", NUMBERED)
@pytest.mark.parametrize("answers", [[1], [1, 2], [1, 0, 3]])
def test_numbers_that_may_be_labels_or_count_from_0_are_refused(numbered, answers, tmp_path):
    row = {"question": "Which?", **numbered("x", "y", "z")}
    said = (
        ":1: `answer` 1 may be choice 1, by its label or 2, counted from 0; give each choice's te"
    )
    with pytest.raises(UserError, match=said):
        problems_of(tmp_path, *({**row, "answer": answer} for answer in answers))


def test_a_letter_that_is_a_label_and_another_choice_s_text_is_refused(tmp_path):
    row = {"question": "Which?", "choices": ["b", "a"], "answer": "b"}
    with pytest.raises(UserError, match=":1: `answer` b may be choice B, by its label or A, by"):
        one(tmp_path, row)
    plain = {"question": "Which?", "choices": ["x", "y"], "answer": "a"}
    assert [p.answer for p in problems_of(tmp_path, row, plain)] == ["B", "A"]
    plain["answer"] = "x"
    assert [p.answer for p in problems_of(tmp_path, row, plain)] == ["A", "A"]
    plain |= {"answer": "Red", "choices": ["red", "blue"]}  # a text in another case is a text
    assert [p.answer for p in problems_of(tmp_path, row, plain)] == ["A", "A"]
    plain["answer"] = "B. blue"
    assert [p.answer for p in problems_of(tmp_path, row, plain)] == ["B", "B"]
    assert one(tmp_path, {**row, "choices": ["c", "d"], "answer": "c"})[1] == "A"


def test_choices_with_empty_places_keep_their_labels(tmp_path):
    row = {"question": "Which?", "choices": ["x", None, "z"], "answer": 2}
    assert one(tmp_path, row) == ("A. x\nC. z", "C")
    with pytest.raises(UserError, match=r"1: `answer` 1 is none of the choices A, C; mend it"):
        one(tmp_path, {**row, "answer": 1})


def test_labels_in_lower_case_stay_as_they_are(tmp_path):
    row = {"question": "Which?", "options": {"a": "x", "b": "y"}, "answer": "B"}
    assert one(tmp_path, row) == ("a. x\nb. y", "b")


def test_a_table_of_csv_has_its_choices_in_cells(tmp_path):
    text = "question,A,B,C,answer\nWhich?,x,y,,B\nWhich?,x,y,z,c\n"
    assert [p.answer for p in problems_of(tmp_path, text, form="csv")] == ["B", "C"]
    text = "question,choices,answer\nWhich?,\"['x', 'y']\",1.0\n"
    assert one(tmp_path, text, form="csv") == ("A. x\nB. y", "B")


def test_initials_are_no_labels(tmp_path):
    names = ["J. Smith", "J. Doe", "K. Lee"]
    row = {"question": "Which?", "choices": names, "answer": "J. Doe"}
    assert one(tmp_path, row) == ("A. J. Smith\nB. J. Doe\nC. K. Lee", "B")
    row["choices"] = ["(A) J. Smith", "(B) J. Doe", "(C) K. Lee"]
    assert one(tmp_path, row) == ("A. J. Smith\nB. J. Doe\nC. K. Lee", "B")


@pytest.mark.parametrize(
    "choices",
    ["x, y", "A. x\nB. y", "['x' 'y']", "__import__('os').getcwd()", [["x"], ["y"]],
     [True, False], ["x"], 7,
     {"text": ["x", "y"], "label": ["A"]}, [{"label": "A", "text": "x"}] * 2, [{"is": "x"}] * 2],
)  # fmt: skip
def test_choices_in_another_form_are_refused_by_their_place(choices, tmp_path):
    good = {"question": "Which?", "choices": ["x", "y"], "answer": "A"}
    with pytest.raises(UserError, match=r"train.jsonl:2: `choices` is .*; expected a list of") as e:
        one(tmp_path, good, {**good, "choices": choices})
    assert "\n" not in str(e.value)


def test_more_choices_than_letters_are_refused(tmp_path):
    row = {"question": "Which?", "choices": [f"x{n}" for n in range(27)], "answer": "x1"}
    with pytest.raises(UserError, match=r":1: .*27 choices are more than there are letters"):
        one(tmp_path, row)


@pytest.mark.parametrize("nothing", [None, [], "", {"A": None, "B": None}])
def test_a_row_without_choices_has_an_answer_of_its_own_or_is_refused(nothing, tmp_path):
    good = {"question": "Which?", "choices": ["x", "y"], "answer": "B"}
    open_one = {"question": "How many?", "choices": nothing, "answer": "7"}
    assert [p.answer for p in problems_of(tmp_path, good, open_one)] == ["B", "7"]
    said = r":2: `answer` {} names a choice, and the row has none in `choices`; add them"
    with pytest.raises(UserError, match=said.format("B")):
        problems_of(tmp_path, good, {**open_one, "answer": "B"})
    said += ", or give the other rows' answers as letters"
    with pytest.raises(UserError, match=said.format("0")):  # the other row counts from 0
        problems_of(tmp_path, {**good, "answer": 1}, {**open_one, "answer": 0})


def test_a_number_that_counts_to_one_choice_and_says_another_is_refused(tmp_path):
    row = {"question": "2+1?", "choices": [1, 2, 3, 4], "answer": 3}
    said = (
        ":1: `answer` 3 may be choice C, by its text or D, counted from 0; give each choice's lab"
    )
    with pytest.raises(UserError, match=said):
        one(tmp_path, row)


def test_other_rows_settle_whether_numbers_count_the_choices(tmp_path):
    row = {"question": "2+1?", "choices": [1, 2, 3, 4], "answer": 3}
    counted = {"question": "Which?", "choices": ["x", "y"], "answer": 1}
    assert [p.answer for p in problems_of(tmp_path, row, counted)] == ["D", "B"]
    said = {"question": "5+5?", "choices": [10, 20], "answer": 10}
    assert [p.answer for p in problems_of(tmp_path, row, said)] == ["C", "A"]
    with pytest.raises(UserError, match=":1: `answer` 3 may be choice C"):
        problems_of(tmp_path, row, counted, said)


@pytest.mark.parametrize("choices", [["\ud800", "b"], {"\ud800": "x", "B": "b"}])
def test_half_a_character_in_a_choice_is_refused_by_its_place(choices, tmp_path):
    with pytest.raises(UserError, match=r":1: `choices` holds half a character"):
        one(tmp_path, {"question": "Which?", "choices": choices, "answer": "b"})


def test_letters_as_answers_to_choices_that_nobody_sees_are_told(tmp_path):
    rows = [{"question": f"Which is {n}?", "endings": ["x", "y"], "answer": "B"} for n in range(3)]
    [line] = problems_of(tmp_path, *rows).remarks
    assert "train: 3 of 3 answers are one letter, such as 'B', and no column is known" in line
    shown = {"question": "Which?\nA. x\nB. y", "answer": "B"}
    assert problems_of(tmp_path, shown, {"question": "x?", "answer": "x"}).remarks == []
