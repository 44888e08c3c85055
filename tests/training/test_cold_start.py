"""Supervised steps: what they teach, and the loss they do it by."""

import pytest
import torch
from conftest import TASK, make_args, make_model, make_setup, make_tokenizer
from toys import distance, naive_logprobs

from evaluation.comparison import summarize
from evaluation.held_out import evaluate
from llms import chat_prompt
from rldatasets import Problem, Problems
from sampling.turns import worked_ids
from training.cold_start import cold_start

WORKED = "<reasoning>\n1 + 1 = 2\n</reasoning>\n<answer>\n2\n</answer>\n"


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_the_worked_answer_is_its_text_and_the_end_of_turn_and_nothing_else(family):
    tokenizer = make_tokenizer(family)
    [(ids, _)] = worked_ids(tokenizer, [Problem("1 + 1?", "2", "1 + 1 = 2")], TASK)
    assert tokenizer.decode(ids) == WORKED + tokenizer.eos_token
    assert tokenizer.bos_token_id not in ids


def test_the_cold_start_s_loss_is_the_mean_over_all_target_tokens(accelerator, monkeypatch):
    """Questions and solutions of unequal length share one padded batch."""
    tokenizer = make_tokenizer()
    model = make_model(vocab_size=len(tokenizer), dtype=torch.float64)
    problems = [
        Problem("1 + 1?", "2", "1 + 1 = 2"),
        Problem("How much is 7?", "7", "It is 7.\nSo."),
    ]
    seen = {}

    def record(optimizer, loss, max_grad_norm, loss_scale):
        seen.update(loss=loss.item(), gradients=[p.grad.clone() for p in model.parameters()])
        optimizer.zero_grad()

    monkeypatch.setattr("training.cold_start.apply_gradients", record)
    args = make_args(
        cold_start_steps=1, cold_start_learning_rate=1e-3, questions_per_step=2, max_grad_norm=1.0
    )
    setup = make_setup(model, args, accelerator, tokenizer)
    cold_start(setup, Problems(problems, 0), chat_prompt, worked_ids)
    logprobs = []
    for problem, (target, _) in zip(problems, worked_ids(tokenizer, problems, TASK)):
        prompt = chat_prompt(tokenizer, TASK.system_prompt, problem.question)
        logprobs.append(
            naive_logprobs(model, torch.tensor(prompt), torch.tensor([target]), 1.0).flatten()
        )
    loss = -torch.cat(logprobs).mean()
    loss.backward()
    assert seen["loss"] == pytest.approx(loss.item(), rel=1e-9)
    assert distance(seen["gradients"], [p.grad for p in model.parameters()]) < 1e-5


def test_the_cold_start_learns_the_worked_answer(accelerator):
    tokenizer = make_tokenizer()
    model = make_model(vocab_size=len(tokenizer), initializer_range=0.05)
    problem = Problem("1 + 1?", "2", "1 + 1 = 2")
    args = make_args(
        cold_start_steps=60, cold_start_learning_rate=1e-2, questions_per_step=1, max_grad_norm=1.0,
        max_completion_length=80, eval_batch_size=1,
    )  # fmt: skip
    setup = make_setup(model, args, accelerator, tokenizer)
    cold_start(setup, Problems([problem], 0), chat_prompt, worked_ids)
    [record] = evaluate(setup, [problem])
    assert record["completion"] == WORKED
    assert summarize([record])["accuracy"] == 1.0


@pytest.mark.parametrize(
    "schedule, rates", [("constant", [0.4, 0.4, 0.4, 0.4]), ("linear", [0.4, 0.3, 0.2, 0.1])]
)
def test_the_rate_of_a_cold_start(schedule, rates, accelerator, monkeypatch):
    seen = []

    def record(optimizer, *_):
        seen.extend(group["lr"] for group in optimizer.param_groups)
        optimizer.zero_grad()

    monkeypatch.setattr("training.cold_start.apply_gradients", record)
    tokenizer = make_tokenizer()
    args = make_args(
        cold_start_steps=4, cold_start_learning_rate=0.4, cold_start_schedule=schedule,
        questions_per_step=1,
    )  # fmt: skip
    setup = make_setup(make_model(vocab_size=len(tokenizer)), args, accelerator, tokenizer)
    cold_start(setup, Problems([Problem("1 + 1?", "2", "1 + 1 = 2")], 0), chat_prompt, worked_ids)
    assert seen == pytest.approx(rates)
