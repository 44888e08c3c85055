"""A flag that does nothing in the given combination says so, and the run starts."""

import pytest

from launch.parser import parse_args

CPU = ["--preset", "cpu", "--plan"]


@pytest.mark.parametrize(
    ("argv", "warning"),
    [
        (["--kl_estimator", "k2"], "--kl_estimator k2 does nothing at --kl_beta 0"),
        (["--clip_epsilon", "0.3"], "--clip_epsilon 0.3 does nothing at --num_inner_epochs 1"),
        (["--clip_epsilon_high", "0.28"], "--clip_epsilon_high 0.28 does nothing"),
        (["--ratio", "sequence"], "--ratio sequence does nothing at --num_inner_epochs 1"),
        (["--update_ref_model_freq", "9"],
         "--update_ref_model_freq 9 does nothing without --update_ref_model"),
        (["--dataset_name", "countdown", "--difficulty", "3"],
         "--difficulty 3 does nothing on other data than --dataset_name arithmetic"),
        (["--cold_start_steps", "0", "--cold_start_learning_rate", "1e-3"],
         "--cold_start_learning_rate 0.001 does nothing at --cold_start_steps 0"),
        (["--allow_changed_rewards"], "--allow_changed_rewards True does nothing without --resume"),
    ],
)  # fmt: skip
def test_an_idle_flag_is_told_in_one_line(argv, warning, capsys):
    parse_args([*CPU, *argv])
    message = capsys.readouterr().err
    assert message.startswith("main.py: warning: ") and warning in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--kl_estimator", "k2", "--kl_beta", "0.1"],
        ["--kl_estimator", "k3"],  # the default, typed
        ["--clip_epsilon", "0.3", "--num_inner_epochs", "2"],
        ["--update_ref_model_freq", "9", "--update_ref_model", "--kl_beta", "0.1"],
        ["--difficulty", "3"],
        ["--ratio", "sequence", "--tis_cap", "2"],  # a correction per token
    ],
)
def test_one_that_acts_is_not(argv, capsys):
    parse_args([*CPU, *argv])
    assert capsys.readouterr().err == ""
