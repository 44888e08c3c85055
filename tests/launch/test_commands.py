"""The commands besides training: as strict and as friendly as it is."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT
from toys import record, write_run

from evaluation.comparison import compare, read_evaluation
from launch import commands
from launch.loading import evaluate_and_save

ARITHMETIC = ["--preset", "cpu", "--eval_problems", "4", "--max_completion_length", "6"]


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ([""], ["main.py: error:", "unknown command"]),
        (["comapre", "a", "b"], ["unknown command comapre; did you mean compare?"]),
        (["xyz"], ["unknown command xyz; there are lint, compare, evaluate, chat, play"]),
        (["compare", "a"], ["main.py compare: error:", "RUN"]),
        (["compare", "a", "b", "--sho", "3"], ["unknown argument --sho; did you mean --show?"]),
        (["compare", "a", "b", "--show", "-1"], ["--show", "'-1' is not a whole number"]),
        (["lint", "--reward_weights", "correctness"], ["is not NAME=WEIGHT"]),
        (["evaluate"], ["main.py evaluate: error:", "MODEL"]),
        (["evaluate", "/nowhere", *ARITHMETIC], ["MODEL /nowhere: no such directory"]),
        (["evaluate", "/nowhere", "--preset", "tpu"], ["main.py evaluate", "--preset", "'tpu'"]),
        (["evaluate", "x", "--dataset_path", "/nowhere"], ["--dataset_path /nowhere: no file"]),
        (["evaluate", "smollm2-135m", *ARITHMETIC, "--dataset_path", "x", "--dataset_name",
          "arithmetic"], ["--dataset_path: arithmetic is generated"]),
        (["evaluate", "smollm2-135m", *ARITHMETIC, "--output_dir", str(ROOT)], ["is not empty"]),
        (["evaluate", "smollm2-135m", *ARITHMETIC, "--max_completion_length", "9000"],
         ["error: --max_completion_length 9000: above the model's context of 8192"]),
        (["evaluate", "smollm2-135m", "--learning_rate", "1"],
         ["unknown argument --learning_rate"]),
    ],
)  # fmt: skip
def test_a_mistake_is_answered_in_one_line_with_status_2(argv, parts, capsys):
    with pytest.raises(SystemExit) as stop:
        commands.main(argv)
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert message.count("\n") == 1 and len(message) <= 201
    assert all(part in message for part in parts), message


def test_an_unknown_reward_is_named_with_those_that_exist(capsys):
    assert commands.main(["lint", "--reward_weights", "corectness=2"]) == 2
    assert "--reward_weights corectness: no such reward; there are" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", [["--help"], ["compare", "--help"], ["evaluate", "-h"], ["lint", "-h"]]
)
def test_help_is_help(argv, command):
    status, out, _ = command(*argv)
    assert status == 0 and "usage: main.py" in out


def test_ctrl_c_ends_a_command_in_one_line(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setitem(commands.DO, "lint", interrupted)
    assert commands.main(["lint"]) == 130
    assert capsys.readouterr().err == "\nmain.py lint: interrupted\n"


def test_without_a_model_to_run_torch_is_never_imported(tmp_path):
    run = write_run(tmp_path / "run", {step: [record("1?", True)] for step in (0, 1)})
    script = """
import runpy, sys
for argv in (["lint"], ["compare", RUN + "@0", RUN],
             ["evaluate", "/nowhere", "--dataset_name", "arithmetic"]):
    sys.argv = ["main.py", *argv]
    sys.modules.pop("launch.door", None)
    try:
        runpy.run_path("main.py", run_name="__main__")
    except SystemExit as stop:
        print("status", stop.code)
print("torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", script.replace("RUN", repr(run))], cwd=ROOT, capture_output=True,
        text=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("status")] == ["status 0", "status 0",
                                                                      "status 2"]  # fmt: skip
    assert "No findings." in lines and lines[-1] == "False", done.stderr


def test_a_model_is_evaluated_into_a_run_that_compare_reads(saved_models, tmp_path, capsys):
    places = []
    for family in ("qwen2", "llama"):
        places.append(str(tmp_path / family))
        evaluate_and_save(commands.parse_command(
            ["evaluate", str(saved_models[family]), *ARITHMETIC, "--eval_samples", "2",
             "--output_dir", places[-1]]
        ))  # fmt: skip
        text = capsys.readouterr().out
        for name in ("accuracy", "lenient_accuracy", "format_rate", "pass@2"):
            assert f"\n{name} " in text
        assert "4 problems" in text and places[-1] in text
    flags = json.loads((tmp_path / "llama" / "config.json").read_text())["flags"]
    assert flags["eval_samples"] == 2 and "learning_rate" not in flags
    text = compare(*map(read_evaluation, places), show=0)
    assert f"A  {places[0]}@0" in text and "4 questions" in text and "pass@2" in text


def test_a_directory_is_found_for_an_evaluation_without_one(saved_models, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    args = commands.parse_command(["evaluate", str(saved_models["qwen2"]), *ARITHMETIC])
    assert args.output_dir.startswith("runs/arithmetic-") and "qwen2" in args.output_dir
