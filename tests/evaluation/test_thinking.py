"""Models that think first: what is judged is what follows the last </think>."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import TASK, make_tokenizer

from evaluation import held_out
from evaluation.comparison import evaluation_table, summarize
from evaluation.held_out import evaluate
from evaluation.scoring import score, truncated_thinking
from evaluator import REWARD_FUNCTIONS, after_thoughts, is_correct, is_correct_leniently
from llms import Rendering
from rldatasets import Problem
from sampling.rollouts import Rollouts, without_thoughts
from utils import read_jsonl


def written(answer):
    return f"<reasoning>\n48 + 24 is that.\n</reasoning>\n<answer>\n{answer}\n</answer>\n"


RIGHT = written("72")
# {completion: (what is judged of it, what is where the template has opened <think>)}
JUDGED = {
    RIGHT: (RIGHT, ""),
    f"<think>\nWith <answer> and <reasoning> tags. 71?\n</think>\n\n{RIGHT}": (RIGHT, RIGHT),
    f"An <answer>71</answer> first? No.\n</think>\n\n{RIGHT}": (RIGHT, RIGHT),
    f"<think>a</think>b<think>c</think>{RIGHT}": (RIGHT, RIGHT),
    f"\n <think>{RIGHT}": ("", ""),
    f"<think>\n{RIGHT}\n</think>": ("", ""),
    f"{RIGHT} <think>": (f"{RIGHT} <think>", ""),
    "": ("", ""),
    "<thinking>no such tag</thinking> 72": ("<thinking>no such tag</thinking> 72", ""),
    "</think>72": ("72", "72"),
}  # fmt: skip


@pytest.mark.parametrize("text", JUDGED)
def test_what_follows_the_last_thought_is_judged(text):
    assert (after_thoughts(text), after_thoughts(text, thinking=True)) == JUDGED[text]


def setup_of(opens_thinking=False, system_prompt=TASK.system_prompt, **args):
    tokenizer = make_tokenizer()
    tokenizer.rendering = Rendering(opens_thinking=opens_thinking)
    args = SimpleNamespace(
        max_completion_length=8, eval_batch_size=2, eval_samples=0, stop=[], temperature=1.0,
        reward_timeout=None, rebuttals=0, **args,
    )  # fmt: skip
    return SimpleNamespace(
        policy=None, tokenizer=tokenizer, args=args, task=replace(TASK, system_prompt=system_prompt)
    )


def rollouts_of(texts, finished=None):
    ones = torch.ones(1, len(texts), 1)
    finished = torch.tensor([finished or [True] * len(texts)])
    return Rollouts([torch.tensor([1])], ones, ones.bool(), ones, finished, [list(texts)])


def totals(texts, **settings):
    judged = without_thoughts(rollouts_of(texts), setup_of(**settings))
    return score(judged, [Problem("?", "72", "")], TASK.reward_functions).total[0].tolist()


THOUGHTS = (
    "<think>\nBetween <reasoning> and <answer>, then </answer>. 48 + 24 = 72.\n</think>\n\n",
    "<think></think>",
    "no tag opens this </reasoning></think>",
    "<think>one</think> two <think>three <answer>7</answer></think>\n",
    "<think>" + "ab " * 500 + "</think>",
)


def test_a_perfect_answer_earns_the_same_after_any_thoughts():
    [perfect] = totals([RIGHT])
    assert perfect >= 4
    assert totals([thought + RIGHT for thought in THOUGHTS]) == [perfect] * len(THOUGHTS)
    assert totals([thought + RIGHT for thought in THOUGHTS], opens_thinking=True) == [perfect] * 5


def test_the_reward_functions_alone_judge_the_answer_too():
    problem = Problem("?", "72", "")
    for thought in THOUGHTS:
        assert sum(reward(thought + RIGHT, problem) for reward in REWARD_FUNCTIONS) == 4.0
        assert is_correct(thought + RIGHT, problem) and not is_correct(thought + "71", problem)
        assert not is_correct_leniently(thought + "71", problem)
    assert not is_correct_leniently("<think>72", problem)


def test_who_is_thinking_still_earns_what_nothing_earns():
    [nothing] = totals([""])
    assert totals([f"<think>{RIGHT}", "<think>"]) == [nothing] * 2
    assert totals([RIGHT, "72"], opens_thinking=True) == [nothing] * 2


def test_where_the_task_asks_for_the_tags_they_are_part_of_the_answer():
    def has_thoughts(completion, problem):
        return float(completion.startswith("<think>"))

    setup = setup_of(system_prompt="Think in <think> tags, then answer.")
    judged = without_thoughts(rollouts_of(["<think>a</think>b"]), setup)
    assert score(judged, [Problem("?", "b", "")], [has_thoughts]).total.item() == 1.0


def test_the_share_cut_off_while_thinking_is_counted_only_where_some_think():
    setup = setup_of()
    texts = ["<think>a", "<think>b</think>c", "<think>d", "e"]
    rollouts = rollouts_of(texts, [False, False, True, False])
    assert truncated_thinking(rollouts, setup) == {"truncated_thinking": 0.25}
    assert truncated_thinking(rollouts_of(["e", "f"], [False, True]), setup) == {}
    opened = setup_of(opens_thinking=True)
    assert truncated_thinking(rollouts_of(["e", "f"], [False, True]), opened) == {
        "truncated_thinking": 0.5
    }


ANSWERED = {  # (text, finished): (right, cut off while thinking)
    (f"<think>No <answer>.</think>{written('1')}", True): (True, False),
    (f"<think>{written('2')}", False): (False, True),
    (written("3"), True): (True, None),
    (f"<think>4</think>{written('9')}", True): (False, False),
    (f"<think>5</think>{written('5')}", False): (True, False),
}


def test_records_hold_all_that_was_written_and_judge_the_answer(monkeypatch):
    texts = list(ANSWERED)

    def answer(model, tokenizer, prompts, group_size, **sampling):
        chosen = [texts[int(prompt) - 1] for prompt in prompts]
        ones = torch.ones(len(chosen), group_size, 1)
        finished = torch.tensor([[finished] * group_size for _, finished in chosen])
        groups = [[text] * group_size for text, _ in chosen]
        return Rollouts([], ones, ones.bool(), ones, finished, groups)

    monkeypatch.setattr(held_out, "sample_rollouts", answer)
    monkeypatch.setattr(held_out, "prompt_of", lambda tokenizer, task, problem: problem.question)
    setup = setup_of()
    setup.args.eval_samples, setup.tokenizer = 2, SimpleNamespace(decode=str)
    problems = [Problem(f"{i}", f"{i}", "") for i in range(1, len(texts) + 1)]
    records = evaluate(setup, problems)
    for record, ((text, _), (right, cut_off)) in zip(records, ANSWERED.items()):
        assert record["completion"] == text
        assert (record["correct"], record.get("truncated_thinking")) == (right, cut_off)
        assert record["format"] == (cut_off is not True)
        samples = [(sample["completion"], sample["correct"]) for sample in record["samples"]]
        assert samples == [(text, right)] * 2
        assert (record["parsed"] is None) == (cut_off is True)
    summary = summarize(records)
    assert summary["truncated_thinking"] == 1 / 5 and summary["accuracy"] == 3 / 5
    assert any("truncated_thinking" in line and "20.0%" in line
               for line in evaluation_table({"a": summary}))  # fmt: skip
    assert "truncated_thinking" not in summarize(records[2:3])
    json.dumps(records)


OPENS = (
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{{ '<think>\n' if think else '' }}{% endif %}"
)


def test_a_run_counts_who_was_cut_off_while_thinking(tmp_path, saved_models, command):
    shutil.copytree(saved_models["qwen2"], tmp_path / "model")
    chat = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>\n{% endfor %}"
    (tmp_path / "model" / "chat_template.jinja").write_text(chat + OPENS)
    status, _, errors = command(
        "--preset", "cpu", "--model_name", tmp_path / "model", "--output_dir", tmp_path / "run",
        "--cold_start_steps", 0, "--num_train_iters", 1, "--eval_problems", 2,
        "--questions_per_step", 2, "--group_size", 2, "--max_completion_length", 4,
        "--max_prompt_length", 900, "--chat_template_kwargs", '{"think": true}',
    )  # fmt: skip
    assert status == 0, errors
    for file in ("metrics.jsonl", "eval.jsonl"):
        for _, row in read_jsonl(tmp_path / "run" / file):
            assert row["truncated_thinking"] == row["truncated"]
