"""Malformed data: the file, the line or the column, the reason, in one line, and exit status 2."""

import json

import pytest

from launch.parser import parse_args
from reading.columns import Fields
from rldatasets import load_problems
from utils import UserError

GOOD = '{"question": "q", "answer": "1"}'
FILES = [  # (name, text, flags, what the line says after the file's name)
    ("a.jsonl", f'{GOOD}\n{{"question": "q", "answer": "1"', {}, ":2: not JSON: "),
    ("a.jsonl", f"{GOOD}\n\n[1]", {}, ":3: expected an object like {...} per line, not one array"),
    ("a.jsonl", f'{GOOD}\n{{"question": "q"}}', {}, ":2: `answer` is missing or empty; every"),
    ("a.jsonl", f'{GOOD}\n{{"question": "", "answer": 1}}', {}, ":2: `question` is missing or"),
    ("a.jsonl", '{"question": 5, "answer": 1}', {}, ":1: `question` is 5; expected text"),
    ("a.jsonl", '{"question": "q", "answer": [1]}', {}, ":1: `answer` is [1]; expected text or"),
    ("a.jsonl", '{"question": "q", "answer": NaN}', {}, ":1: `answer` is nan; expected text or"),
    ("a.jsonl", '{"question": "q", "answer": "so ####"}', {}, ":1: nothing after #### in `answer`"),
    ("a.jsonl", '{"foo": 1, "bar": 2}', {},
     ": no column is known for the question; there are `foo`, `bar`; name it by --question_field"),
    ("a.jsonl", '{"question": "q", "text": "x"}', {},
     ": no column is known for the answer; there are `question`, `text`; name it by --answer_f"),
    ("a.jsonl", '{"prompt": "q", "instruction": "q", "answer": 1}', {},
     ": `prompt` and `instruction` may be the question; say which by --question_field"),
    ("a.jsonl", '{"question": "q", "target": 1, "ground_truth": 2}', {},
     ": `ground_truth` and `target` may be the answer; say which by --answer_field"),
    ("a.jsonl", GOOD, {"answer_field": "gold"}, "has no such column; there are `question`, `ans"),
    ("a.jsonl", '{"problem": "q", "solution": "It is 5."}', {},
     ":1: `solution` marks no answer, by \\boxed{} or ####; name the column"),
    ("a.jsonl", '{"messages": []}', {}, ":1: `messages` is a conversation of several turns, or"),
    ("a.jsonl", '{"messages": [{"role": "tool", "content": "x"}]}', {},
     ":1: `messages` holds a message that is not a text {role, content} of user, assistant or"),
    ("a.jsonl", '{"messages": [{"role": ["user"], "content": "x"}]}', {},
     ":1: `messages` holds a message that is not a text"),
    ("a.jsonl", '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', {},
     ":1: `messages` holds a message that is not a text"),
    ("a.jsonl", '{"question": "q", "choices": ["x", "y"], "answer": "z"}', {},
     ":1: `answer` z is none of the choices A, B; mend it, or rename `choices`"),
    ("a.json", f'[{GOOD},\n{{"question": }}]', {}, ":2: not JSON: Expecting value; expected [{"),
    ("a.json", f"[{GOOD}, 7]", {}, ", row 2: expected an object like {...}, not one int"),
    ("a.json", '[{"question": "q", "question": "q"}]', {}, ": a row gives `question` twice; leave"),
    ("a.json", '[{"question": "q", "answer": NaN}]', {}, ", row 1: `answer` is nan; expected text"),
    ("a.json", "[]", {}, ": no problems in its"),
    ("a.csv", "question,answer\nWhat, then?,1\n", {}, ":2: 3 values for 2 columns; quote what"),
    ("a.csv", "question,question\na,b\n", {}, ":1: `question` twice in the line of column names"),
    ("a.csv", "question,\na,b\n", {}, ":1: an empty name in the line of column names"),
    ("a.csv", 'question,answer\nq,1\n"open,2\n', {}, ":3: not CSV: unexpected end of data"),
    ("a.csv", b"question,answer\nq,1\n\xff\xfe,2\n", {}, ":3: not UTF-8; save it as that"),
    ("a.csv", "question,answer\nq,\n", {}, ":2: `answer` is missing or empty"),
    ("a.parquet", b"PAR1 no more", {}, ": not Parquet, or damaged: "),
    ("a.xlsx", b"PK", {}, ": .xlsx is not read; save it as CSV"),
    ("a.jsonl.gz", b"\x1f\x8b", {}, ": .gz is not read; unpack it"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "flags", "said"), FILES)
def test_a_malformed_file_is_told_by_its_place_and_reason(name, text, flags, said, tmp_path):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        load_problems("gsm8k", tmp_path / name, "train", 0, fields=Fields(**flags))
    message = str(error.value).replace(str(tmp_path), "")
    assert said in message and name in message
    assert "\n" not in message and len(message) < 200


def test_a_folder_that_save_to_disk_did_not_leave_is_told(tmp_path):
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(UserError, match="damaged, or not by save_to_disk"):
        load_problems("gsm8k", tmp_path, "train", 0)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--dataset_path", "nowhere.csv"], "--dataset_path nowhere.csv: no file nowhere.csv; exp"),
        (["--dataset_path", "empty"], "--dataset_path empty: no file train.jsonl there (or"),
        (["--dataset_path", "a.xlsx"], "--dataset_path a.xlsx: .xlsx is not read; save it as CSV"),
        (["--dataset_path", "b.csv", "--dataset_name", "org/name"],
         "--dataset_path: --dataset_name org/name is on the hub; leave one out"),
        (["--dataset_name", "org/"], "'org/' is unknown"),
        (["--dataset_name", "gsm9k"], "'gsm9k' is unknown; did you mean gsm8k"),
    ],
)  # fmt: skip
def test_what_can_be_told_without_reading_is_told_at_once(
    argv, said, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("a.xlsx", "b.csv"):
        (tmp_path / name).write_text("")
    with pytest.raises(SystemExit) as stop:
        parse_args(["--preset", "cpu", *argv])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and said in message


def test_a_malformed_file_ends_a_run_with_status_2_before_a_model_loads(
    command, tmp_path, saved_models
):
    (tmp_path / "own.jsonl").write_text('{"foo": 1}\n')
    status, out, err = command(
        "--preset", "cpu", "--model_name", saved_models["qwen2"], "--dataset_path",
        tmp_path / "own.jsonl", "--max_prompt_length", "30", "--max_completion_length", "4",
        "--output_dir", tmp_path / "run",
    )  # fmt: skip
    assert status == 2 and "loading" not in out
    assert err.endswith("name it by --question_field\n") and err.count("\n") == 1


# --- what is said and does not end a run ---------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "warning"),
    [
        (["--question_field", "q"], "--question_field q does nothing on problems that are made"),
        (["--dataset_path", "b.jsonl", "--test_split", "dev"],
         "--test_split dev does nothing on one file"),
    ],
)  # fmt: skip
def test_a_flag_that_does_nothing_here_says_so(argv, warning, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b.jsonl").write_text(GOOD)
    parse_args(["--preset", "cpu", *argv])
    assert capsys.readouterr().err == f"main.py: warning: {warning}\n"


def test_latex_golds_are_pointed_to_the_task_that_reads_them(tmp_path):
    from launch.loading import remarks
    from tasks import load_task

    rows = [{"question": f"q {n}?", "answer": rf"\frac{{{n}}}{{\sqrt{{2}}}}"} for n in range(40)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    args = parse_args(["--preset", "cpu", "--dataset_path", str(tmp_path / "own.jsonl")])
    task = load_task(args)
    problems = task.problems("test")
    [said] = [line for line in remarks(task, problems) if "LaTeX" in line]
    assert f"{len(problems)} of {len(problems)} gold answers are LaTeX" in said
    assert "--dataset_name math" in said
    plain = [problem for problem in load_problems("arithmetic", None, "test", 0)][:3]
    assert not [line for line in remarks(task, plain) if "LaTeX" in line]
