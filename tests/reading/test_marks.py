"""Where in a text the answer stands, and what stands before the question."""

import json

import pytest

from reading.columns import Fields
from rldatasets import load_problems
from utils import UserError


def problems_of(folder, *rows, **fields):
    """The problems of these rows, of which a test split has the same."""
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_problems("gsm8k", folder, "train", 0, fields=Fields(**fields))


# --- marks ---------------------------------------------------------------------------------------

HEADINGS = "#### Step 1: add\n2+3=5\n#### Conclusion\nThe answer is "


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (HEADINGS + r"\boxed{5}.", "5"), (HEADINGS + "5.", HEADINGS + "5."), ("C#### 5", "5"),
        ("##### 5", "##### 5"), ("So.\n#### 5 apples", "5 apples"), ("So. #### 5", "5"),
        ("So.\n#### $1,080\nThe answer is: 1080", "$1,080"), ("#### 1\nor \\boxed{2}", "1"),
        ("So.\n#### \\boxed{5}", "5"), ("#### Then\n#### 5", "5"),
        ("3+1=4.#### 4", "4"), ("Half.\n#### \\frac{1}{2}\nDone.", "\\frac{1}{2}"),
        ("So.\n#### 10 PM\nThe answer is: 10 PM", "10 PM"), ("#### 72\n#### Check\nfine", "72"),
        ("#### a\n#### 10 PM\nThe answer is: 10 PM.\n", "10 PM"),
        ("#### Step 1: add\nIn Step 1: add them.\nSo 5.",
         "#### Step 1: add\nIn Step 1: add them.\nSo 5."),
        ("#### Add\nSo \\boxed{5}", "5"), ("##### Add\n5", "##### Add\n5"),
        ("#### PM\n#### b\n\nIt is 10PM", "#### PM\n#### b\n\nIt is 10PM"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("column", ["answer", "output"])
def test_the_mark_is_the_last_that_is_no_heading(text, answer, column, tmp_path):
    [problem] = problems_of(tmp_path, {"question": "q", column: text})
    assert problem.answer == answer


@pytest.mark.parametrize(
    ("column", "fields"), [("answer", {}), ("generated", {"answer_field": "generated"})]
)
def test_a_boxed_answer_is_what_the_last_box_holds_whatever_its_column(column, fields, tmp_path):
    text = r"First \boxed{4}. So the total is $\boxed{\frac{1}{2}}$."
    problems = problems_of(tmp_path, {"question": "q", column: text}, **fields)
    assert (problems[0].answer, problems[0].solution) == (r"\frac{1}{2}", text)
    assert rf"answer from `{column}`, its \boxed{{}}; the first" in problems.taken


def test_rows_without_the_mark_of_the_others_are_told(tmp_path):
    texts = ["So.\n#### 6", "#### Day\nIt is\nTuesday.", "#### 7"]
    problems = problems_of(tmp_path, *({"question": text, "answer": text} for text in texts))
    assert "answer from `answer`, its #### (1 of 3 rows have none: the whole)" in problems.taken
    assert "the whole) (rows with #### as a heading alone: 1);" in problems.taken
    assert problems_of(tmp_path, {"question": "q", "answer": texts[0]}).taken == ""


def test_headings_are_told_of_columns_that_are_plain_otherwise(tmp_path):
    rows = [{"question": "q", "answer": HEADINGS + "5."}, {"question": "q", "answer": "5"}]
    said = "answer from `answer` (rows with #### as a heading alone: 1); the first"
    assert said in problems_of(tmp_path, *rows).taken
    row = {"question": "q", "output": HEADINGS}
    said = "answer from `output`, the whole (rows with #### as a heading alone: 1); the"
    assert said in problems_of(tmp_path, row).taken
    rows[0]["answer"] += r" \boxed{5}"
    assert "(rows with #### as a heading alone: 1)" in problems_of(tmp_path, *rows).taken


def test_a_box_below_the_mark_s_line_does_not_count(tmp_path):
    [problem] = problems_of(tmp_path, {"question": "q", "answer": "#### 72\nso \\boxed{73}"})
    assert problem.answer == "72"


def test_a_box_alone_is_no_way_to_the_answer(tmp_path):
    [problem] = problems_of(tmp_path, {"question": "q", "answer": r"$\boxed{5}$"})
    assert (problem.answer, problem.solution) == ("5", "")


@pytest.mark.parametrize("column", ["output", "response", "completion"])
def test_how_many_worked_texts_mark_no_answer_is_told(column, tmp_path):
    texts = [r"So \boxed{5}.", "So.\n#### 6", "Paris", "Rome"]
    problems = problems_of(tmp_path, *({"question": text, column: text} for text in texts))
    assert [problem.answer for problem in problems] == ["5", "6", "Paris", "Rome"]
    assert (f"answer from `{column}`, its #### or \\boxed{{}} (2 of 4 rows have none: the whole);"
            in problems.taken)  # fmt: skip
    problems = problems_of(tmp_path, {"question": "q", column: "Paris"})
    assert f"answer from `{column}`, the whole (no row has \\boxed{{}} or ####)" in problems.taken


# --- what a question is about --------------------------------------------------------------------


@pytest.mark.parametrize("context", ["context", "passage", "article", "Body", "support"])
@pytest.mark.parametrize(
    ("question", "answer"), [("question", "answer"), ("Question", "Answer"),
                             ("instruction", "response")]
)  # fmt: skip
def test_what_a_question_is_about_stands_before_it(context, question, answer, tmp_path):
    row = {context: "Tom has 5 pens.", question: "How many pens?", answer: "5"}
    problems = problems_of(tmp_path, row)
    assert problems[0].question == "Tom has 5 pens.\n\nHow many pens?"
    assert problems[0].extra == {context: "Tom has 5 pens."}
    assert f"question from `{question}`, its context from `{context}`, answer" in problems.taken


def test_a_context_may_be_several_texts_or_missing(tmp_path):
    rows = [{"context": ["One.", "Two."], "question": "q", "answer": "5"},
            {"context": None, "question": "q", "answer": "5"}]  # fmt: skip
    assert [p.question for p in problems_of(tmp_path, *rows)] == ["One.\n\nTwo.\n\nq", "q"]
    assert problems_of(tmp_path, rows[1]).taken == ""


@pytest.mark.parametrize("other", [{"a": ["x"]}, 5, [["x"]]])
def test_a_context_that_is_no_text_is_told_to_be_left_out(other, tmp_path):
    problems = problems_of(tmp_path, {"context": other, "question": "q", "answer": "5"})
    assert problems[0].question == "q"
    assert "from `answer`, nothing from `context`, which is no text; the first" in problems.taken


def test_a_prompt_is_whole_and_a_column_has_one_use(tmp_path):
    row = {"prompt": "Add 5.", "context": "no", "answer": "5"}
    assert problems_of(tmp_path, row)[0].question == "Add 5."
    row = {"question": "no", "context": "Add 5.", "answer": "5"}
    assert problems_of(tmp_path, row, question_field="context")[0].question == "Add 5."


# --- columns -------------------------------------------------------------------------------------


def test_a_field_in_a_column_is_known_from_any_row(tmp_path):
    rows = [{"prompt": "p", "reward_model": {"ground_truth": "5"}, "meta": {"a": {"b": 1.10}}},
            {"prompt": "q", "reward_model": None, "meta": {"a": {"b": 2}}}]  # fmt: skip
    with pytest.raises(UserError, match=r":1: `reward_model.ground_truth` is missing or empty"):
        problems_of(tmp_path, *reversed(rows))
    problems = problems_of(tmp_path, *rows, answer_field="meta.a.b")
    assert [problem.answer for problem in problems] == ["1.1", "2"]
    with pytest.raises(UserError, match=r"--answer_field meta.a.c: .* has no such column; there"):
        problems_of(tmp_path, *rows, answer_field="meta.a.c")


def test_a_solution_that_is_no_text_ends_a_run_only_where_a_flag_names_it(tmp_path):
    row = {"question": "q", "answer": "5", "solution": 5}
    [problem] = problems_of(tmp_path, row)
    assert (problem.answer, problem.solution, problem.extra) == ("5", "", {"solution": 5})
    with pytest.raises(UserError, match=":1: `solution` is 5; expected text"):
        problems_of(tmp_path, row, solution_field="solution")


def test_a_solution_that_is_no_text_among_texts_is_refused_by_its_place(tmp_path):
    rows = [{"question": "q", "answer": "5", "solution": one} for one in ("So 5.", None, [1])]
    with pytest.raises(UserError, match=r":3: `solution` is \[1\]; expected text"):
        problems_of(tmp_path, *rows)
    assert [p.solution for p in problems_of(tmp_path, *rows[:2])] == ["So 5.", ""]
    for blank in (None, "", []):
        rows[1]["solution"] = blank
        found = problems_of(tmp_path, *rows[1:])
        assert [p.extra for p in found] == [{"solution": blank}, {"solution": [1]}]
