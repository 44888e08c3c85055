"""What a run begins with: its problems and its model, and whatever is wrong with them."""

import os

from evaluation import check_room
from llms import chat_prompt, load_model
from lora import add_adapter
from rldatasets import Problems, fingerprint
from utils import UserError, hub_token


def load(args, accelerator, task, start=None):
    """Data, then model: (policy, tokenizer, train problems, test problems, facts of the data).

    Raises UserError, before anything is written, for whatever only the files themselves can tell.
    """
    train_problems, test_problems = (task.problems(split) for split in ("train", "test"))
    if args.cold_start_steps and not all(problem.solution for problem in train_problems):
        raise UserError(f"--cold_start_steps {args.cold_start_steps}: the data has no worked "
                        "solutions (field `solution`); set it to 0")  # fmt: skip
    test_problems = test_problems[: args.eval_problems or None]
    processes = accelerator.num_processes
    for flag, count in (
        ("questions_per_step", args.questions_per_step), ("eval_problems", len(test_problems)),
    ):  # fmt: skip
        if count < processes:
            raise UserError(f"--{flag} {count}: less than one for each of {processes} processes; "
                            "raise it, or start fewer")  # fmt: skip
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # else only one process has the weights
    print(f"loading {args.model_name} ...", flush=True)
    policy, tokenizer = load_model(args.model_name, accelerator.device, hub_token())
    add_adapter(policy, args)

    def prompt_length(problem):
        return len(chat_prompt(tokenizer, task.system_prompt, problem.question))

    fitting = [p for p in train_problems if prompt_length(p) <= args.max_prompt_length]
    left_out = len(train_problems) - len(fitting)
    if left_out:
        print(f"{left_out} of {len(train_problems)} training questions left out: their prompts are "
              f"longer than --max_prompt_length {args.max_prompt_length}")  # fmt: skip
    if not fitting:
        raise UserError(f"--max_prompt_length {args.max_prompt_length}: no training prompt is that "
                        "short; raise it")  # fmt: skip
    check_room(policy, tokenizer, test_problems, args.max_completion_length, task)
    data = {
        "train_problems": len(fitting),
        "left_out": left_out,
        "test_problems": len(test_problems),
        "problems_sha256": fingerprint([*fitting, *test_problems]),
    }
    if start and start.data != data:
        raise UserError(f"--resume: {start.path} was trained on other problems than these")
    return policy, tokenizer, Problems(fitting, args.seed), test_problems, data
