"""The files that people have: every form and every usual shape of row, read as it is meant."""

import csv
import json

import pytest

from reading.columns import Fields, last_box
from rldatasets import fingerprint, load_problems
from utils import UserError

PAIRS = [(f"Ina has {n} pens, and buys {n}. How many?", str(2 * n)) for n in range(3, 40)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def both_splits(path, **fields):
    return [*(load_problems("gsm8k", path, split, 0, fields=Fields(**fields))
              for split in ("train", "test"))]  # fmt: skip


def read(path, **fields):
    """All problems of one file, by their order in it."""
    train, test = both_splits(path, **fields)
    assert len(test) > 0
    return sorted([*train, *test], key=lambda problem: [q for q, _ in PAIRS].index(
        problem.question.partition("\n")[0]))  # fmt: skip


def user(text):
    return [{"role": "user", "content": text}]


SHAPES = {  # name: (a row of question and answer, what the line says of it)
    "question": (lambda q, a: {"question": q, "answer": a}, ""),
    "problem": (lambda q, a: {"problem": q, "answer": a, "solution": "w"},
                "question from `problem`, answer from `answer`, solution from `solution`"),
    "math": (lambda q, a: {"problem": q, "solution": rf"So $\boxed{{{a}}}$.", "level": "Level 1"},
             "question from `problem`, answer from `solution`"),
    "prompt": (lambda q, a: {"prompt": q, "ground_truth": a},
               "question from `prompt`, answer from `ground_truth`"),
    "prompt of messages": (lambda q, a: {"prompt": user(q), "solution": rf"$\boxed{{{a}}}$"},
                           "question from `prompt`, answer from `solution`"),
    "system": (lambda q, a: {"prompt": [{"role": "system", "content": "Be."}, *user(q)],
                             "answer": a}, "question from `prompt`"),
    "messages": (lambda q, a: {"messages": [*user(q), {"role": "assistant", "content": a}]},
                 "question from `messages`, answer from `messages`"),
    "parts": (lambda q, a: {"messages": [
        {"role": "user", "content": [{"type": "text", "text": q}]},
        {"role": "assistant", "content": f"Doubled.\n#### {a}"}]}, "question from `messages`"),
    "sharegpt": (lambda q, a: {"conversations": [{"from": "human", "value": q},
                                                 {"from": "gpt", "value": a}]},
                 "question from `conversations`"),
    "alpaca": (lambda q, a: {"instruction": q, "input": "", "output": a},
               "question from `instruction`, its input from `input`, answer from `output`, "
               "the whole (no row has \\boxed{} or ####)"),
    "verl": (lambda q, a: {"data_source": "x", "prompt": user(q), "ability": "math",
                           "reward_model": {"style": "rule", "ground_truth": a},
                           "extra_info": {"answer": "no", "index": 1}},
             "question from `prompt`, answer from `reward_model.ground_truth`"),
    "completion of messages": (lambda q, a: {"prompt": user(q), "completion": [
        {"role": "assistant", "content": f"Doubled.\n#### {a}"}]},
        "question from `prompt`, answer from `completion`, its ####;"),
    "developer": (lambda q, a: {"messages": [
        {"role": "developer", "content": "Be."}, *user(q),
        {"role": "assistant", "content": a}]}, "question from `messages`"),
    "a solution that is no text": (lambda q, a: {"question": q, "answer": a, "solution": [a]}, ""),
    "capitals": (lambda q, a: {"Question": q, "Answer": a},
                 "question from `Question`, answer from `Answer`"),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_a_usual_shape_is_read_without_a_flag_and_one_line_says_how(shape, tmp_path):
    row, said = SHAPES[shape]
    path = write(tmp_path / "own.jsonl", [row(*pair) for pair in PAIRS])
    assert [(p.question, p.answer) for p in read(path)] == PAIRS
    line = load_problems("gsm8k", path, "train", 0).taken
    assert bool(line) == bool(said) and said in line and "\n" not in line
    if said:
        assert line.startswith(f"{path}: ") and "How many?' -> '6'" in line


def test_what_is_not_used_reaches_the_rewards_and_a_way_to_the_answer_the_cold_start(tmp_path):
    path = write(tmp_path / "own.jsonl", [SHAPES["math"][0](*pair) for pair in PAIRS])
    problem = read(path)[0]
    assert problem.solution == r"So $\boxed{6}$." and problem.extra == {"level": "Level 1"}
    path = write(tmp_path / "verl.jsonl", [SHAPES["verl"][0](*pair) for pair in PAIRS])
    problem = read(path)[0]
    assert problem.solution == "" and problem.extra["extra_info"] == {"answer": "no", "index": 1}


def test_alpaca_s_input_follows_its_instruction(tmp_path):
    rows = [{"instruction": q, "input": "Pens only.", "output": a} for q, a in PAIRS]
    assert read(write(tmp_path / "own.jsonl", rows))[0].question == f"{PAIRS[0][0]}\nPens only."


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"\boxed{5}", "5"), (r"first \boxed{1}, then $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed {x^{2}}", "x^{2}"), (r"\fbox{a}", "a"), (r"\boxed{1} \boxed{2", "1"),
        (r"\boxed{}", ""), ("none", ""), (r"\boxed{" * 100_000, ""),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{x\right.}", r"\left\{x\right."), ("}" + r"\boxed{7}", "7"),
    ],
)  # fmt: skip
def test_the_last_whole_box_is_the_answer(text, box):
    assert last_box(text) == box


# --- forms of files ------------------------------------------------------------------------------

EXACT = ["007", "null", "1.10", "2e-06", str(2**63), "12345678901234567890", "true", " x", "1,080"]


def exact_rows():
    return [{"question": PAIRS[i][0], "answer": text, "note": text}
            for i, text in enumerate(EXACT)]  # fmt: skip


def saved_as(form, folder, rows):
    path = folder / f"own.{form}"
    if form == "jsonl":
        return write(path, rows)
    if form == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif form in ("csv", "tsv"):
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="," if form == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, path)
    return path


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_a_text_is_the_text_of_the_file_in_every_form(form, tmp_path):
    found = read(saved_as(form, tmp_path, exact_rows()))
    assert [p.answer for p in found] == [text.strip() for text in EXACT]
    assert [p.extra for p in found] == [{"note": text} for text in EXACT]


def test_every_form_of_the_same_rows_has_the_same_fingerprint(tmp_path):
    rows = [{"question": q, "answer": a} for q, a in PAIRS]
    prints = {fingerprint(read(saved_as(form, tmp_path, rows)))
              for form in ("jsonl", "json", "csv", "tsv", "parquet")}  # fmt: skip
    assert len(prints) == 1


@pytest.mark.parametrize("digits", ["1.10", "2e-06", str(2**63), "1" + 20 * "0", "-0.0"])
def test_a_number_keeps_its_digits_in_an_array_too(digits, tmp_path):
    rows = ",\n".join(f'{{"question": "{q}", "answer": {digits}, "n": 1.50}}' for q, _ in PAIRS)
    (tmp_path / "own.json").write_text(f" [{rows}]")
    problem = read(tmp_path / "own.json")[0]
    assert problem.answer == digits and problem.extra == {"n": 1.5}


def test_numbers_of_parquet_are_those_of_its_types(tmp_path):
    rows = [{"question": q, "answer": 2**63 - 1, "share": 0.1, "tags": ["a", None]}
            for q, _ in PAIRS]  # fmt: skip
    problem = read(saved_as("parquet", tmp_path, rows))[0]
    assert problem.answer == str(2**63 - 1)
    assert problem.extra == {"share": 0.1, "tags": ["a", None]}


def test_a_cell_may_hold_separators_quotes_and_lines(tmp_path):
    question = 'She said: "two; or, three",\nthen left. How many?'
    path = saved_as("csv", tmp_path, [{"question": question, "answer": "2"}] * 2)
    assert {p.question for split in ("train", "test")
            for p in _of(path, split)} == {question}  # fmt: skip
    (tmp_path / "own.csv").write_text(
        f",question,answer\n0,{PAIRS[0][0]},6\n".replace("s, and", "s and")
    )
    assert [p.extra for split in ("train", "test") for p in _of(path, split)] == [{}]
    (tmp_path / "own.csv").write_text(f"question;answer\n{PAIRS[0][0]};1,5\n")
    assert [p.answer for split in ("train", "test") for p in _of(path, split)] == ["1,5"]


def _of(path, split):
    try:
        return [*load_problems("gsm8k", path, split, 0)]
    except UserError:  # the only question is in the other one
        return []


# --- folders and splits --------------------------------------------------------------------------


def test_the_shards_of_a_folder_are_read_in_order(tmp_path):
    rows = [{"question": q, "answer": a} for q, a in PAIRS]
    (tmp_path / "data").mkdir()
    for i, part in enumerate((rows[:10], rows[10:30])):
        path = saved_as("parquet", tmp_path, part)
        path.rename(tmp_path / "data" / f"train-0000{i}-of-00002.parquet")
    saved_as("parquet", tmp_path, rows[30:]).rename(
        tmp_path / "data" / "test-00000-of-00001.parquet"
    )
    train, test = both_splits(tmp_path)
    assert [p.question for p in [*train, *test]] == [q for q, _ in PAIRS] and len(test) == 7


def test_a_split_that_is_not_there_is_named_and_one_may_be_both(tmp_path):
    rows = [{"question": q, "answer": a} for q, a in PAIRS]
    write(tmp_path / "train.jsonl", rows)
    said = r"no split `test`; there are train: name one by --test_split; --test_split train holds"
    with pytest.raises(UserError, match=said):
        both_splits(tmp_path)
    whole = both_splits(write(tmp_path / "all.rows", rows))
    alone = both_splits(tmp_path, test_split="train")
    assert [[*one] for one in alone] == [[*one] for one in whole]
    write(tmp_path / "validation.jsonl", rows[:5])
    train, test = both_splits(tmp_path, test_split="validation")
    assert (len(train), len(test)) == (len(rows), 5)
    saved_as("csv", tmp_path, rows).rename(tmp_path / "train.csv")
    with pytest.raises(UserError, match=r"several files of split `train`: train.csv, train.jsonl"):
        both_splits(tmp_path, test_split="validation")


def test_a_test_split_alone_is_enough_to_evaluate_on(tmp_path):
    write(tmp_path / "test.jsonl", [{"question": q, "answer": a} for q, a in PAIRS])
    assert len(load_problems("gsm8k", tmp_path, "test", 0)) == len(PAIRS)
    with pytest.raises(UserError, match=r"no split `train`; there are test: name one by --train"):
        load_problems("gsm8k", tmp_path, "train", 0)


@pytest.fixture
def table():
    datasets = pytest.importorskip("datasets")
    rows = [{"question": q, "choices": ["0", a, "-1"], "answer": 1, "n": 2**53 + 1}
            for q, a in PAIRS]  # fmt: skip
    labelled = datasets.Dataset.from_list(rows)
    return labelled.cast_column("answer", datasets.ClassLabel(names=["A", "B", "C"]))


def test_what_save_to_disk_left_is_read_in_the_order_it_had(table, tmp_path):
    from datasets import DatasetDict

    turned = table.select([*range(len(PAIRS))][::-1])
    DatasetDict({"train": turned, "test": table.select(range(4))}).save_to_disk(tmp_path / "both")
    train, test = both_splits(tmp_path / "both")
    assert [p.question.partition("\n")[0] for p in train] == [q for q, _ in PAIRS][::-1]
    assert test[0].question == f"{PAIRS[0][0]}\nA. 0\nB. 6\nC. -1" and test[0].answer == "B"
    assert test[0].extra["n"] == 2**53 + 1
    table.save_to_disk(tmp_path / "one")
    train, test = both_splits(tmp_path / "one")
    assert len(train) + len(test) == len(PAIRS) and len(test) > 0


def test_a_dataset_of_the_hub_is_read_by_its_name_and_configuration(table, monkeypatch):
    import datasets

    asked = []

    def load_dataset(path, config, token):
        asked.append((path, config))
        assert token == "hf_mine"
        if config is None:
            raise ValueError("Config name is missing.\nPlease pick one among ['main', 'socratic']")
        turned = table.select([*range(len(PAIRS))][::-1])
        return datasets.DatasetDict({"train": turned, "validation": table.select(range(9))})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    fields = Fields(test_split="validation")
    test = load_problems("org/name/main", None, "test", 0, fields=fields)
    assert len(test) == 9 and test.taken.startswith(
        "--dataset_name org/name/main, validation: question from"
    )
    train = load_problems("org/name/main", None, "train", 0, fields=fields)
    assert [p.question.partition("\n")[0] for p in train] == [q for q, _ in PAIRS][::-1]
    with pytest.raises(UserError, match=r"org/name: the hub did not deliver: Config name is missing"
                                        r".*\['main'"):  # fmt: skip
        load_problems("org/name", None, "test", 0, fields=fields)
    assert asked == [("org/name", "main")] * 2 + [("org/name", None)]


# --- flags ---------------------------------------------------------------------------------------


def test_the_flags_name_columns_and_fields_in_them(tmp_path):
    rows = [{"q": user(q), "meta": {"gold": a}, "way": "so", "answer": "other"} for q, a in PAIRS]
    path = write(tmp_path / "own.jsonl", rows)
    problem = read(path, question_field="q", answer_field="meta.gold", solution_field="way")[0]
    assert (problem.question, problem.answer, problem.solution) == (*PAIRS[0], "so")
    assert problem.extra == {"meta": {"gold": "6"}, "answer": "other"}


# --- multiple choice -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "lines", "answer"),
    [
        ({"choices": ["3", "5", "7"], "answer": 1}, "A. 3\nB. 5\nC. 7", "B"),
        ({"choices": ["2", "1", "0"], "answer": 1}, "A. 2\nB. 1\nC. 0", "B"),
        ({"options": ["red", "blue"], "answer": "blue"}, "A. red\nB. blue", "B"),
        ({"options": ["red", "blue"], "answer": "a"}, "A. red\nB. blue", "A"),
        ({"choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
         "1. x\n2. y", "2"),
        ({"options": {"A": "x", "B": "y"}, "answer": "B"}, "A. x\nB. y", "B"),
        ({"options": ["A)21", "B)21.5"], "answer": "B"}, "A. 21\nB. 21.5", "B"),
    ],
)  # fmt: skip
def test_the_choices_reach_the_prompt_and_the_answer_is_the_label(row, lines, answer, tmp_path):
    path = write(tmp_path / "train.jsonl", [{"question": "Which?", **row}])
    write(tmp_path / "test.jsonl", [{"question": "Which?", **row}])
    [problem] = load_problems("gsm8k", tmp_path, "train", 0)
    assert (problem.question, problem.answer) == (f"Which?\n{lines}", answer)
    assert path.exists() and problem.extra == {k: v for k, v in row.items() if "nswer" not in k}
