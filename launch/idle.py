"""What does nothing in the company of other flags: `checks.py` says so, and the run starts."""

import os

from tasks import is_on_hub

FORMAT_REWARDS = ("integer_format", "strict_format", "soft_format", "tag_count")  # in evaluator.py


def corrects_tokens(args):
    """Whether a completion's tokens have different corrections for the sampler."""
    return args.tis_cap > 0 and args.tis_form.startswith("token")


# (flags, when they do nothing, in words); those of LoRA are an error, see check_lora.
IDLE = (
    (("update_ref_model_freq", "ref_model_mixup_alpha"),
     lambda args: not args.update_ref_model, "without --update_ref_model"),
    (("kl_estimator",), lambda args: args.kl_beta == 0, "at --kl_beta 0"),
    (("clip_epsilon", "clip_epsilon_high", "clip_delta"),
     lambda args: args.num_inner_epochs == 1, "at --num_inner_epochs 1: the ratio is 1"),
    # With a correction per token, what has one ratio for a completion spreads a token's gradient
    # over all of it; cispo, which has the gradient of the log-probs themselves, does not.
    (("ratio",), lambda args: args.num_inner_epochs == 1 and not (corrects_tokens(args) and
                                                                  args.clip != "cispo"),
     "at --num_inner_epochs 1: the ratio is 1"),
    (("clip",), lambda args: args.num_inner_epochs == 1 and not (
        corrects_tokens(args)
        and (args.clip == "gmpo" or (args.clip == "cispo" and args.ratio == "sequence"))),
     "at --num_inner_epochs 1: the ratio is 1"),
    (("clip_epsilon", "clip_epsilon_high"),
     lambda args: args.num_inner_epochs > 1 and args.clip == "sapo", "with --clip sapo"),
    (("clip_delta",), lambda args: args.num_inner_epochs > 1 and args.clip != "ppo",
     "without --clip ppo"),
    (("tis_floor", "tis_form"), lambda args: args.tis_cap == 0, "at --tis_cap 0"),
    (("entropy_target",), lambda args: args.entropy_bonus == 0, "at --entropy_bonus 0"),
    (("skip_flat_groups",), lambda args: args.entropy_bonus > 0,
     "with --entropy_bonus, which is for them too"),
    (("skip_flat_groups",), lambda args: args.kl_beta == args.entropy_bonus == 0,
     "at --kl_beta 0: they have no gradient"),
    (("baseline",), lambda args: args.advantage_scale == "gdpo", "with --advantage_scale gdpo"),
    (("question_field", "answer_field", "solution_field", "train_split", "test_split"),
     lambda args: args.dataset_path is None and args.dataset_name != "gsm8k"
     and not is_on_hub(args.dataset_name), "on problems that are made"),
    (("train_split", "test_split"),
     lambda args: args.dataset_path is not None and os.path.isfile(args.dataset_path),
     "on one file"),
    (("difficulty",), lambda args: args.dataset_name != "arithmetic",
     "on other data than --dataset_name arithmetic"),
    (("cold_start_learning_rate", "cold_start_schedule"), lambda args: args.cold_start_steps == 0,
     "at --cold_start_steps 0"),
    (("vllm_python", "vllm_devices", "vllm_arguments", "vllm_transfer", "vllm_timeout"),
     lambda args: args.sampler != "vllm", "without --sampler vllm"),
    (("sampling_batch_size",), lambda args: args.sampler == "vllm", "with --sampler vllm"),
    (("allow_changed_rewards",), lambda args: args.resume is None, "without --resume"),
)  # fmt: skip


def remarks(task, args, default_of):
    """What flags do not do in this task, or with its rewards, a line each."""
    for name in ("tremble", "opponents"):
        if default_of and task.game is None and getattr(args, name) != default_of(name):
            yield f"--{name} {getattr(args, name)} does nothing in a task that is no game"
    if getattr(args, "eval_referee", None) and task.rebut:
        yield (f"--eval_referee {args.eval_referee} does nothing in a debate, where the sides meet "
               "each other and no earlier answer")  # fmt: skip
    if remark := _of_scale(task, args):
        yield f"--advantage_scale {remark}"


def _of_scale(task, args):
    """What --advantage_scale does not do, or should not, with these rewards; None where it does."""
    scale = getattr(args, "advantage_scale", None)  # not of all commands
    counting = [f.__name__ for f in task.reward_functions if args.reward_weights.get(f.__name__, 1)]
    of_format = [f"{name}=0" for name in FORMAT_REWARDS if name in counting]
    if scale == "max_rl" and of_format:
        return ("max_rl: rewards for format raise every mean; set their weights to 0 by "
                f"--reward_weights {' '.join(of_format)}")  # fmt: skip
    if scale == "gdpo" and len(counting) + bool(args.overlong_buffer) + bool(task.game) == 1:
        return "gdpo with one reward function differs from std in scale alone"
    return None
