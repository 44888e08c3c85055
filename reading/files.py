"""Files and folders of data as rows, with every value as it stands there.

JSON and CSV are read here: `datasets` makes 7 of the text "007", None of "null", and gives a
changed file's old rows where its time was kept. Parquet and Arrow say what type a value has, so
pyarrow, which is imported for them alone, reads them exactly.

A row comes with its place, for whoever complains about it: FILE:LINE, or FILE, row N.
"""

import csv
import io
import json
import re
from functools import partial
from pathlib import Path

from reading.columns import has_numbers, value_at
from utils import RepeatedKey, UserError, is_number, read_jsonl, without_repeats

SHARD = re.compile(r"(.+?)(?:-(\d+)-of-(\d+))?")  # train-00000-of-00002.parquet
ELSEWHERE = {  # forms that people have and that are not read, with the way out
    ".xlsx": "save it as CSV", ".xls": "save it as CSV", ".arrow": "name its folder",
    ".gz": "unpack it", ".zip": "unpack it", ".zst": "unpack it", ".bz2": "unpack it",
    ".pkl": "save it as Parquet", ".pickle": "save it as Parquet", ".txt": "save it as JSON lines",
}  # fmt: skip


def read_rows(path, as_written=()):
    """The rows of one file as [(place, {column: value})]. Finite numbers of JSON in the columns
    `as_written` are the text that stands there; a.b, of field b in column a, is a column then.
    Raises UserError, naming file and line or row."""
    path = Path(path)
    form = path.suffix.lower()
    if form in ELSEWHERE:
        raise UserError(f"{path}: {form} is not read; {ELSEWHERE[form]}")
    if form in FORMS and form not in (".json", ".jsonl"):
        return FORMS[form](path)
    return _json_rows(path, as_written)


def _json_rows(path, as_written):
    """JSON lines, or one array of objects, whatever the file is called."""
    try:
        with open(path, "rb") as file:
            start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if not start.startswith(b"["):
        rows = read_jsonl(path, as_written=as_written)
        if any(has_numbers(rows, name) for name in as_written):  # in fields of columns
            lines = _text(path).split("\n")
            texts = (lines[number - 1].removeprefix("\ufeff") for number, _ in rows)
            _keep_digits([row for _, row in rows], as_written, map(_with_digits, texts))
        return [(f"{path}:{number}", row) for number, row in rows]
    text = _text(path)
    rows = _array(path, text)
    if as_written:
        _keep_digits(rows, as_written, _with_digits(text))
    return [(f"{path}, row {number}", row) for number, row in enumerate(rows, 1)]


def _with_digits(text):
    return json.loads(text, parse_float=str, parse_int=str)


def _keep_digits(rows, as_written, texts):
    for row, text in zip(rows, texts):
        numbers = {name: value_at(row, name) for name in as_written}
        written = {name: value_at(text, name) for name in as_written}
        row |= {name: written[name] for name in as_written if is_number(numbers, name)}


def _array(path, text):
    try:
        rows = json.loads(text, object_pairs_hook=without_repeats)
    except RepeatedKey as error:
        raise UserError(f"{path}: a row gives `{error}` twice; leave one of them out") from None
    except (ValueError, RecursionError) as error:
        place = f"{path}:{error.lineno}" if hasattr(error, "lineno") else path
        reason = str(error).partition(": line")[0]
        raise UserError(f"{place}: not JSON: {reason:.80}; expected [{{...}}, {{...}}]") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            kind = "array" if isinstance(row, list) else type(row).__name__
            raise UserError(
                f"{path}, row {number}: expected an object like {{...}}, not one {kind}"
            )
    return rows


def _text(path):
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8; save it as that") from None


def _csv_rows(path):
    text = _text(path)
    head = text.partition("\n")[0]
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=head.count)
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows, line = [], 1
    try:
        names = [name.strip() for name in next(reader, [])]
        for name in names[names[:1] == [""] :]:  # pandas writes its index first, without a name
            if not name or names.count(name) > 1:
                complaint = f"`{name}` twice" if name else "an empty name"
                raise UserError(f"{path}:1: {complaint} in the line of column names; mend it")
        for values in reader:
            start, line = line + 1, reader.line_num
            if not values:
                continue
            if len(values) != len(names):
                raise UserError(f"{path}:{start}: {len(values)} values for {len(names)} columns; "
                                "quote what holds the separator")  # fmt: skip
            row = dict(zip(names, values))
            row.pop("", None)
            rows.append((f"{path}:{start}", row))
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not CSV: {error}") from None
    return rows


def _parquet_rows(path):
    import pyarrow  # a third of a second, and only such files need it
    import pyarrow.parquet

    try:
        with open(path, "rb") as file:  # a ParquetFile takes no folder for a data set
            table = pyarrow.parquet.ParquetFile(file).read()
    except OSError as error:
        reason = error.strerror or _first_line(error)
        raise UserError(f"{path}: {reason}") from None
    except (pyarrow.ArrowException, ValueError) as error:
        raise UserError(f"{path}: not Parquet, or damaged: {_first_line(error)}") from None
    names = table.column_names
    for name in names:
        if names.count(name) > 1:  # a row would hold the last of them
            raise UserError(f"{path}: `{name}` twice among its columns; keep one")
    try:
        rows = table.to_pylist()
    except (OverflowError, ValueError) as error:
        raise _unreadable(path, table, error) from None
    rows = _short_floats(rows, table.schema)
    return [(f"{path}, row {number}", row) for number, row in enumerate(rows, 1)]


def _unreadable(where, table, error):
    """The complaint about a value that Python lacks, such as a date after the year 9999."""
    for name in table.column_names:
        try:
            table.column(name).to_pylist()
        except (OverflowError, ValueError):
            where = f"{where}: `{name}`"
            break
    return UserError(f"{where} holds what cannot be read ({_first_line(error)}); mend it, or leave "
                     "the column out")  # fmt: skip


def _short_floats(rows, schema):
    """The rows of an Arrow table, a float32 having the digits that tell it from its neighbours: 0.1
    and not 0.10000000149011612. A table without float32 costs nothing."""
    import pyarrow

    for field in schema:
        wide = _widened(field.type, pyarrow.float64())
        if wide != field.type:
            column = pyarrow.array([row[field.name] for row in rows], field.type)
            digits = column.cast(_widened(field.type, pyarrow.string()))
            for row, value in zip(rows, digits.cast(wide).to_pylist()):
                row[field.name] = value
    return rows


def _widened(kind, leaf):
    """An Arrow type with `leaf` in the place of float32, in whatever holds it."""
    from pyarrow import large_list, list_, map_, struct, types

    if types.is_float32(kind):
        return leaf
    if types.is_dictionary(kind):  # each value once, and where it stands
        wide = _widened(kind.value_type, leaf)
        return kind if wide == kind.value_type else wide

    def inner(field):
        return field.with_type(_widened(field.type, leaf))

    if types.is_struct(kind):
        return struct([inner(field) for field in kind])
    if types.is_map(kind):
        return map_(inner(kind.key_field), inner(kind.item_field), kind.keys_sorted)
    if types.is_fixed_size_list(kind):
        return list_(inner(kind.value_field), kind.list_size)
    for is_list, made in ((types.is_list, list_), (types.is_large_list, large_list)):
        if is_list(kind):
            return made(inner(kind.value_field))
    return kind


def _first_line(error):
    return f"{' '.join(str(error).split()):.80}"


FORMS = {".jsonl": None, ".json": None, ".csv": _csv_rows, ".tsv": _csv_rows,
         ".parquet": _parquet_rows, ".pq": _parquet_rows}  # fmt: skip


# --- splits --------------------------------------------------------------------------------------


def file_splits(folder):
    """{split: a function that makes its [(place, row)]} of the files in a folder: train.jsonl,
    train.csv, train-00000-of-00002.parquet, ...; of those in its data/ where it has none itself, as
    repositories of the hub do. The function raises UserError where a split is there twice."""
    for place in (Path(folder), Path(folder) / "data"):
        found = {}
        for file in sorted(place.iterdir()) if place.is_dir() else ():
            if file.suffix.lower() in FORMS and file.is_file():
                found.setdefault(SHARD.fullmatch(file.stem)[1], []).append(file)
        if found:
            break
    return {split: partial(_joined, folder, split, files) for split, files in found.items()}


def _joined(folder, split, files, as_written=()):
    """The rows of a split's files, all of one form and, as their names number them, none missing.
    Raises UserError."""
    names = ", ".join(file.name for file in files)
    shards = [SHARD.fullmatch(file.stem) for file in files]
    counts = {int(shard[3] or 0) for shard in shards}
    if (
        len({file.suffix for file in files}) > 1
        or (len(files) > 1 and counts == {0})
        or (len(counts) > 1)
    ):
        raise UserError(f"{folder}: several files of split `{split}`: {names:.80}; keep one")
    if counts != {0} and counts != {len({int(shard[2]) for shard in shards})}:
        raise UserError(f"{folder}: {len(files)} of {max(counts)} files of split `{split}`, as "
                        f"their names count: {names:.80}; add what is missing")  # fmt: skip
    return [row for file in files for row in read_rows(file, as_written)]


def is_saved(folder):
    """Whether a folder is what datasets' save_to_disk leaves."""
    return any((Path(folder) / name).is_file() for name in ("dataset_dict.json", "state.json"))


def saved_splits(folder):
    """{split: a function that makes its [(place, row)]} of a save_to_disk folder; the split of a
    single Dataset is None. Raises UserError."""
    from datasets import DatasetDict, load_from_disk  # takes seconds, and no other path needs it

    try:
        saved = load_from_disk(str(folder))
    except Exception as error:  # a library of many layers, each with errors of its own
        raise UserError(
            f"{folder}: damaged, or not by save_to_disk: {_first_line(error)}"
        ) from None
    return arrow_splits(saved if isinstance(saved, DatasetDict) else {None: saved}, folder)


def arrow_splits(splits, where):
    """{split: a function that makes its [(place, row)]}, of {split: datasets.Dataset}."""

    def rows(split, dataset, as_written=()):  # numbers have a type, and no writing
        names = {
            column: feature.names
            for column, feature in dataset.features.items()
            if getattr(feature, "names", None)
        }
        place = f"{where}, {split}" if split else where
        try:
            table = dataset.with_format("arrow")[:].to_pylist()
        except (OverflowError, ValueError) as error:
            arrow = dataset.with_format("arrow")
            raise _unreadable(place, arrow[:], error) from None
        for row in _short_floats(table, dataset.features.arrow_schema):
            for column, labels in names.items():  # of a ClassLabel, which is a number
                label = row[column]
                row[column] = None if label is None or label < 0 else labels[label]
        return [(f"{place} row {number}", row) for number, row in enumerate(table, 1)]

    return {split: partial(rows, split, dataset) for split, dataset in splits.items()}
