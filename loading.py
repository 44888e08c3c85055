"""What a run begins with: its problems and its model, and whatever is wrong with them."""

from evaluation import check_room
from llms import chat_prompt, load_model
from lora import add_adapter
from rldatasets import SYSTEM_PROMPT, Problems, fingerprint, load_problems
from utils import UserError, hub_token


def load(args, accelerator, start=None):
    """Data, then model: (policy, tokenizer, train problems, test problems, facts of the data).

    Raises UserError, before anything is written, for whatever only the files themselves can tell.
    """
    if accelerator.num_processes > 1:
        raise UserError("several processes are not supported: start it with `python main.py`")
    train_problems, test_problems = (
        load_problems(args.dataset_name, args.dataset_path, split, args.seed, args.difficulty)
        for split in ("train", "test")
    )
    if args.cold_start_steps and not all(problem.solution for problem in train_problems):
        raise UserError(f"--cold_start_steps {args.cold_start_steps}: the data has no worked "
                        "solutions (field `solution`); set it to 0")  # fmt: skip
    test_problems = test_problems[: args.eval_problems or None]
    policy, tokenizer = load_model(args.model_name, accelerator.device, hub_token())
    add_adapter(policy, args)

    def prompt_length(problem):
        return len(chat_prompt(tokenizer, SYSTEM_PROMPT, problem.question))

    fitting = [p for p in train_problems if prompt_length(p) <= args.max_prompt_length]
    left_out = len(train_problems) - len(fitting)
    if left_out:
        print(f"{left_out} of {len(train_problems)} training questions left out: their prompts are "
              f"longer than --max_prompt_length {args.max_prompt_length}")  # fmt: skip
    if not fitting:
        raise UserError(f"--max_prompt_length {args.max_prompt_length}: no training prompt is that "
                        "short; raise it")  # fmt: skip
    check_room(policy, tokenizer, test_problems, args.max_completion_length)
    data = {
        "train_problems": len(fitting),
        "left_out": left_out,
        "test_problems": len(test_problems),
        "problems_sha256": fingerprint([*fitting, *test_problems]),
    }
    if start and start.data != data:
        raise UserError(f"--resume: {start.path} was trained on other problems than these")
    return policy, tokenizer, Problems(fitting, args.seed), test_problems, data
