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
        (["--clip", "sapo"], "--clip sapo does nothing at --num_inner_epochs 1"),
        (["--clip", "gmpo"], "--clip gmpo does nothing at --num_inner_epochs 1"),
        (["--clip_delta", "4"], "--clip_delta 4.0 does nothing at --num_inner_epochs 1"),
        (["--clip", "sapo", "--clip_epsilon", "0.3", "--num_inner_epochs", "2"],
         "--clip_epsilon 0.3 does nothing with --clip sapo"),
        (["--clip", "cispo", "--clip_delta", "4", "--num_inner_epochs", "2"],
         "--clip_delta 4.0 does nothing without --clip ppo"),
        (["--tis_form", "token_mask"], "--tis_form token_mask does nothing at --tis_cap 0"),
        (["--tis_floor", "0.5"], "--tis_floor 0.5 does nothing at --tis_cap 0"),
        (["--entropy_target", "0.3"], "--entropy_target 0.3 does nothing at --entropy_bonus 0"),
        (["--advantage_scale", "gdpo", "--baseline", "leave_one_out"],
         "--baseline leave_one_out does nothing with --advantage_scale gdpo"),
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
        ["--clip", "gmpo", "--tis_cap", "2"],  # the same
        ["--clip_delta", "4", "--num_inner_epochs", "2"],
        ["--tis_cap", "5", "--tis_floor", "0.5", "--tis_form", "token_mask"],
        ["--entropy_bonus", "0.01", "--entropy_target", "0.3", "--top_entropy", "0.2"],
    ],
)
def test_one_that_acts_is_not(argv, capsys):
    parse_args([*CPU, *argv])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--clip_delta", "1.2"], "--clip_delta 1.2: not above 1 + --clip_epsilon_high, 1.2"),
        (["--tis_cap", "2", "--tis_floor", "2"], "--tis_floor 2: not below --tis_cap 2"),
        (["--clip", "gmpo", "--ratio", "sequence"], "--ratio sequence: --clip gmpo makes a ratio"),
        (["--ratio", "sequence", "--top_entropy", "0.2"], "--top_entropy 0.2: a ratio of the"),
        (["--clip", "gmpo", "--top_entropy", "0.2"], "--top_entropy 0.2: a ratio of the"),
        (["--top_entropy", "0"], "--top_entropy"),
    ],
)
def test_flags_of_the_objective_that_contradict_each_other_are_refused(argv, complaint, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args([*CPU, *argv])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and complaint in message and message.count("\n") == 1
