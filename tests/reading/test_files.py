"""Files that are refused or read with care: Parquet's types, shards, folders with other files."""

import datetime
import json

import pytest

from launch.loading import what_was_taken
from launch.parser import parse_args
from reading.columns import Fields
from reading.files import _widened, arrow_splits
from rldatasets import load_problems
from utils import UserError

ROWS = [{"question": f"What is {n}?", "answer": str(n)} for n in range(12)]


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path, split="train", **fields):
    return load_problems("gsm8k", path, split, 0, fields=Fields(**fields))


def folder_of(table, folder):
    """A Parquet file for each split, of one table."""
    import pyarrow.parquet

    for split in ("train", "test"):
        pyarrow.parquet.write_table(table, folder / f"{split}.parquet")
    return folder


# --- Parquet and Arrow ---------------------------------------------------------------------------


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    import pyarrow

    columns = [pyarrow.array([text]) for text in ("q?", "1", "2")]
    table = pyarrow.Table.from_arrays(columns, names=["question", "answer", "answer"])
    with pytest.raises(UserError, match=r"train.parquet: `answer` twice among its columns; keep"):
        read(folder_of(table, tmp_path))


@pytest.mark.parametrize(("kind", "value"), [("timestamp", 2**62), ("date32", 2**30)])
def test_a_date_that_no_calendar_has_is_named_by_its_column(kind, value, tmp_path):
    import pyarrow

    made = pyarrow.timestamp("us") if kind == "timestamp" else pyarrow.date32()
    table = pyarrow.table(
        {"question": ["q"], "answer": ["5"], "seen": pyarrow.array([value], made)}
    )
    with pytest.raises(
        UserError, match=r"train.parquet: `seen` holds what cannot be read \(.*; me"
    ):
        read(folder_of(table, tmp_path))


def test_so_it_is_in_what_save_to_disk_left(tmp_path):
    datasets = pytest.importorskip("datasets")
    import pyarrow

    dates = pyarrow.array([2**30], pyarrow.date32())
    table = pyarrow.table({"question": ["q"], "answer": ["5"], "seen": dates})
    datasets.Dataset(datasets.table.InMemoryTable(table)).save_to_disk(tmp_path / "one")
    with pytest.raises(UserError, match=r"one: `seen` holds what cannot be read \(days"):
        read(tmp_path / "one")


def test_float32_has_the_digits_that_it_has(tmp_path):
    import pyarrow

    short, long = pyarrow.float32(), pyarrow.float64()
    nested = pyarrow.struct([("a", short), ("b", long), ("c", pyarrow.list_(short))])
    table = pyarrow.table({"question": ["p", "q"], "answer": pyarrow.array([0.1, 2.5], short),
        "more": pyarrow.array([{"a": 0.1, "b": 1 / 3, "c": [0.2, None]}, None], nested),
        "when": [datetime.date(2020, 1, 1)] * 2})  # fmt: skip
    problems = read(folder_of(table, tmp_path))
    assert [problem.answer for problem in problems] == ["0.1", "2.5"]
    assert problems[0].extra["more"] == {"a": 0.1, "b": 1 / 3, "c": [0.2, None]}
    assert problems[1].extra == {"more": None, "when": datetime.date(2020, 1, 1)}


def nested_floats():
    import pyarrow

    short = pyarrow.float32()
    kinds = {"pair": (pyarrow.list_(short, 2), [[0.1, 0.2], None]),
             "many": (pyarrow.large_list(short), [[0.1], [None]]),
             "map": (pyarrow.map_(pyarrow.string(), short), [[("a", 0.1)], None]),
             "within": (pyarrow.list_(pyarrow.struct([("a", pyarrow.list_(short, 1))])),
                        [[{"a": [0.1]}, None], []])}  # fmt: skip
    columns = {name: pyarrow.array(values, kind) for name, (kind, values) in kinds.items()}
    few = pyarrow.array([0.1, 0.1], short).dictionary_encode()
    names = pyarrow.array(["a", "b"]).dictionary_encode()
    table = {"question": ["p", "q"], "answer": ["1", "2"], "few": few, "names": names, **columns}
    rows = [{"few": 0.1, "names": name, **{column: kinds[column][1][n] for column in kinds}}
            for n, name in enumerate("ab")]  # fmt: skip
    return pyarrow.table(table), rows


def test_float32_has_its_digits_in_whatever_holds_it(tmp_path):
    table, rows = nested_floats()
    assert [problem.extra for problem in read(folder_of(table, tmp_path))] == rows


def test_a_type_without_float32_stays_the_same_type():
    import pyarrow
    from pyarrow import field, int8, large_list, list_, map_, string, struct

    held = field("element", string(), nullable=False)
    kinds = [
        list_(held),
        list_(held, 2),
        large_list(held),
        struct([held]),
        int8(),
        map_(string(), held, keys_sorted=True),
        pyarrow.dictionary(int8(), string()),
    ]
    assert [_widened(kind, pyarrow.float64()) for kind in kinds] == kinds


def test_what_save_to_disk_left_is_fetched_once_and_has_its_digits(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    table, rows = nested_floats()
    table = table.drop_columns(["few", "names", "map"])
    saved = datasets.Dataset(datasets.table.InMemoryTable(table))
    fetched, fetch = [], datasets.Dataset.__getitem__
    monkeypatch.setattr(
        datasets.Dataset, "__getitem__", lambda *args: fetched.append(args) or fetch(*args)
    )
    [split] = arrow_splits({None: saved}, "here").values()
    found = [row for _, row in split()]
    assert [row["pair"] for row in found] == [row["pair"] for row in rows]
    assert [row["within"] for row in found] == [row["within"] for row in rows]
    assert len(fetched) == 1


def test_the_short_name_of_parquet_is_known(tmp_path):
    import pyarrow

    folder_of(pyarrow.Table.from_pylist(ROWS), tmp_path)
    for split in ("train", "test"):
        (tmp_path / f"{split}.parquet").rename(tmp_path / f"{split}.pq")
    assert [problem.answer for problem in read(tmp_path)] == [row["answer"] for row in ROWS]


# --- JSON ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["jsonl", "json"])
@pytest.mark.parametrize("digits", ["1.10", "12345678901234567890.5", "2e-06"])
def test_a_number_in_a_field_of_a_column_keeps_its_digits(form, digits, tmp_path):
    row = f'{{"prompt": "q", "reward_model": {{"ground_truth": {digits}, "n": 1.50}}}}'
    for split in ("train", "test"):
        text = f"[{row}]" if form == "json" else f"\ufeff{row}\n\n\ufeff{row}\n"
        (tmp_path / f"{split}.{form}").write_text(text, encoding="utf-8")
    for problem in read(tmp_path):
        assert problem.answer == digits
        assert problem.extra == {"reward_model": {"ground_truth": float(digits), "n": 1.5}}


# --- folders -------------------------------------------------------------------------------------


def test_files_of_other_names_may_stand_in_a_folder_twice(tmp_path):
    for name in ("train.jsonl", "test.jsonl", "notes.json", "notes.csv"):
        lines(tmp_path / name, ROWS)
    assert len(read(tmp_path)) == len(ROWS)
    with pytest.raises(
        UserError, match=r"several files of split `notes`: notes.csv, notes.json; k"
    ):
        read(tmp_path, train_split="notes")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["-00000-of-00003", "-00002-of-00003"], "2 of 3 files of split `train`, as their names"),
        (["-00000-of-00002", "-00000-of-00003"], "several files of split `train`"),
        (["-00000-of-00001", ""], "several files of split `train`"),
    ],
)
def test_a_split_whose_files_are_not_all_there_is_refused(names, said, tmp_path):
    for name in names:
        lines(tmp_path / f"train{name}.jsonl", ROWS)
    lines(tmp_path / "test.jsonl", ROWS)
    with pytest.raises(UserError, match=said):
        read(tmp_path)
    assert len(read(tmp_path, "test")) == len(ROWS)


def test_names_of_splits_do_nothing_on_a_single_saved_table_and_a_line_says_so(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    [line] = read(tmp_path / "one", test_split="dev").remarks
    assert line == "--test_split dev does nothing on one table: one question in five is held out"
    assert read(tmp_path / "one").remarks == []


# --- what a run says -----------------------------------------------------------------------------


def test_a_run_says_what_each_split_was_taken_from_where_they_differ(tmp_path, capsys):
    from launch.loading import read_problems
    from tasks import load_task

    lines(tmp_path / "train.jsonl", [{"problem": row["question"], "answer": "x"} for row in ROWS])
    lines(tmp_path / "test.jsonl", [{"query": "q", "final_answer": row["answer"]} for row in ROWS])
    args = parse_args(["--preset", "cpu", "--dataset_path", str(tmp_path)])
    read_problems(args, load_task(args))
    said = capsys.readouterr().out.splitlines()
    assert "train: question from `problem`, answer from `answer`" in said[0]
    assert "test: question from `query`, answer from `final_answer`" in said[1]
    splits = [read(tmp_path, split, test_split="train") for split in ("train", "test")]
    assert what_was_taken(*splits) == [splits[0].taken]


def test_letters_that_name_no_choices_are_told_by_a_run(tmp_path):
    lines(tmp_path / "own.jsonl", [{**row, "answer": "B"} for row in ROWS])
    [line] = what_was_taken(read(tmp_path / "own.jsonl"), read(tmp_path / "own.jsonl", "test"))
    assert "12 of 12 answers are one letter, such as 'B'" in line
