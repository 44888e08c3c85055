"""A flag that does nothing in the given combination says so, and the run starts."""

from itertools import product

import pytest
import torch

from grpo import Batch, grpo_loss, token_weights
from launch.parser import parse_args
from training.update import objective_of

CPU = ["--preset", "cpu", "--plan", "--kl_beta", "0"]


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
        (["--dataset_name", "countdown", "--skip_flat_groups"],
         "--skip_flat_groups True does nothing at --kl_beta 0: they"),
        (["--dataset_name", "countdown", "--skip_flat_groups", "--entropy_bonus", "0.1"],
         "--skip_flat_groups True does nothing with --entropy_bonus"),
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
        ["--dataset_name", "nim", "--tremble", "0.1"],
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


def told(argv, capsys):
    """(the flags of a run, which of these do nothing as it says)."""
    args = parse_args([*CPU, *argv])
    return args, capsys.readouterr().err


def gradient(args):
    """That of the log-probs of four completions, at a step's first update."""
    generator = torch.Generator().manual_seed(0)
    now, sampled = (torch.randn(4, 6, generator=generator).double() - 2 for _ in range(2))
    mask = torch.rand(1, 4, 6, generator=generator) > 0.2
    advantages = torch.tensor([1.0, -0.5, 0.8, -1.3]).double()
    batch = Batch(sampled, advantages, token_weights(mask)[0])
    loss, _ = grpo_loss(now.requires_grad_(), batch, objective_of(args))
    return torch.autograd.grad(loss, now)[0]


@pytest.mark.parametrize("form", [None, "token_truncate", "token_mask", "sequence_truncate"])
def test_ratio_and_clip_are_told_idle_where_the_gradient_is_that_without_them(form, capsys):
    corrected = [] if form is None else ["--tis_cap", "2", "--tis_form", form]
    for clip, ratio in product(("ppo", "cispo", "sapo", "gmpo"), ("token", "sequence")):
        flags = {"--clip": clip, "--ratio": ratio}
        if (clip, ratio) == ("gmpo", "sequence"):  # refused
            continue
        args, said = told([*corrected, *sum(flags.items(), ())], capsys)
        for flag, default in (("--clip", "ppo"), ("--ratio", "token")):
            other = {**flags, flag: default}
            without, _ = told([*corrected, *sum(other.items(), ())], capsys)
            same = torch.allclose(gradient(args), gradient(without), atol=1e-9)
            is_told = f"{flag} {flags[flag]} does nothing at --num_inner_epochs 1" in said
            assert is_told == (same and flags[flag] != default), (form, flags, said)


ALONE = ["--reward_weights", "integer_format=0", "strict_format=0", "soft_format=0", "tag_count=0"]


@pytest.mark.parametrize(
    ("argv", "warning"),
    [
        (["--advantage_scale", "max_rl"],
         "--advantage_scale max_rl: rewards for format raise every mean; set their weights to 0 by "
         "--reward_weights integer_format=0 strict_format=0 soft_format=0 tag_count=0"),
        (["--advantage_scale", "max_rl", *ALONE[:-1]],
         "--advantage_scale max_rl: rewards for format raise every mean; set their weights to 0 by "
         "--reward_weights tag_count=0"),
        (["--advantage_scale", "gdpo", *ALONE],
         "--advantage_scale gdpo with one reward function differs from std in scale alone"),
        (["--advantage_scale", "max_rl", *ALONE], None),
        (["--advantage_scale", "gdpo"], None),
        (["--advantage_scale", "gdpo", *ALONE, "--overlong_buffer", "8"], None),
        (["--advantage_scale", "batch_std"], None),
        (["--tremble", "0.1"], "--tremble 0.1 does nothing in a task that is no game"),
        (["--dataset_name", "nim", "--tremble", "0.1"], None),
        (["--opponents", "self"], None),
        (["--opponents", "pool", "--kl_beta", "0.1"],
         "--opponents pool does nothing in a task that is no game"),
        (["--dataset_name", "debate", "--cold_start_steps", "0", "--referee", "start",
          "--eval_referee", "smollm2-135m"],
         "--eval_referee smollm2-135m does nothing in a debate, where the sides meet"),
    ],
)  # fmt: skip
def test_what_does_not_suit_the_task_and_its_rewards_is_told_in_one_line(
    argv, warning, tmp_path, capsys
):
    parse_args(["--preset", "cpu", "--output_dir", str(tmp_path / "run"), *argv])
    said = capsys.readouterr().err
    assert said.startswith(f"main.py: warning: {warning}") if warning else said == ""
    assert said.count("\n") == (1 if warning else 0) and len(said) <= 201


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
