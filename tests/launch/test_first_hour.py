"""Words that new users typed, and what answers them."""

import subprocess
import sys

import pytest
from conftest import ROOT

from launch.commands import parse_command
from launch.parser import parse_args
from utils import EMBEDDED_MODEL


@pytest.mark.parametrize(
    "argv, answers",
    [
        (["--lr", "1e-5"], "did you mean --learning_rate or --lora_rank?"),
        (["--nti", "3"], "did you mean --num_train_iters?"),
        (["--kl_coef", "0"], "did you mean --kl_beta?"),
        (["--group_size", "1"], "'1' is not a whole number of at least 2 (see"),
    ],
)
def test_a_flag_that_is_none_is_answered_by_the_one_that_was_meant(argv, answers, capsys):
    with pytest.raises(SystemExit) as exit:
        parse_args(argv)
    assert exit.value.code == 2 and answers in capsys.readouterr().err


def test_train_is_no_command_and_the_answer_says_how_to_train(capsys):
    with pytest.raises(SystemExit):
        parse_command(["train"])
    assert "without a command it trains" in capsys.readouterr().err


def test_chat_takes_its_question_in_any_place():
    argv = ["chat", EMBEDDED_MODEL, "--preset", "cpu"]
    assert parse_command([*argv[:2], "2 + 2?", *argv[2:]]).ask == "2 + 2?"
    assert parse_command([*argv, "2 + 2?"]).ask == "2 + 2?"
    assert parse_command(argv).ask is None


def test_on_windows_one_line_says_what_is_missing_and_what_to_use():
    code = "import sys; sys.platform = 'win32'; sys.modules['fcntl'] = None; import main"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "Windows has no fcntl" in done.stderr and "use WSL2" in done.stderr
