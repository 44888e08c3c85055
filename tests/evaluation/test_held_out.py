"""Held-out answers: greedy and sampled, what a record holds and what a summary says of them."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import TASK, make_args, make_model, make_setup, make_tokenizer
from toys import written

from evaluation import held_out
from evaluation.comparison import evaluation_table, summarize
from evaluation.held_out import evaluate, evaluate_policy
from evaluation.significance import wilson_interval
from llms import chat_prompt
from records.run import summary_table
from rldatasets import SYSTEM_PROMPT, Problem
from sampling.groups import sample_rollouts
from sampling.rollouts import Rollouts
from utils import mixed_seed

PROBLEMS = [Problem("ab" * i, str(i), "") for i in range(1, 8)]


@pytest.fixture(scope="module")
def toy():
    tokenizer = make_tokenizer()
    model = make_model(vocab_size=len(tokenizer), dtype=torch.float64)
    model.generation_config.do_sample, model.generation_config.top_k = True, 5
    return make_setup(model, make_args(max_completion_length=12), tokenizer=tokenizer)


def with_args(setup, **flags):
    return replace(setup, args=make_args(**{**vars(setup.args), **flags}))


def test_evaluation_is_greedy_repeatable_and_independent_of_the_batch_size(toy):
    runs = [evaluate(with_args(toy, eval_batch_size=size), PROBLEMS) for size in (1, 3, 100)]
    assert runs[0] == runs[1] == runs[2]
    assert [record["question"] for record in runs[0]] == [p.question for p in PROBLEMS]
    assert summarize(runs[0])["problems"] == 7


def test_a_record_holds_all_that_was_asked_answered_and_judged(toy):
    records = evaluate(with_args(toy, eval_batch_size=4), PROBLEMS)
    assert list(records[2]) == [
        "question", "prompt", "answer", "completion", "parsed", "lenient_parsed", "correct",
        "lenient_correct", "format", "length", "finished", "rewards",
    ]  # fmt: skip
    prompt = chat_prompt(toy.tokenizer, SYSTEM_PROMPT, "ababab")
    assert toy.tokenizer.encode(records[2]["prompt"], add_special_tokens=False) == prompt


def saying(*texts):
    """A stand-in for the sampler: problem i is answered by texts[i - 1], a text or a group."""

    def answer(model, tokenizer, prompts, group_size, **sampling):
        groups = [texts[int(prompt) - 1] for prompt in prompts]
        groups = [[group] if isinstance(group, str) else group for group in groups]
        shape = (len(prompts), group_size)
        return Rollouts(
            [], torch.zeros(*shape, 1), torch.ones(*shape, 1, dtype=torch.bool),
            torch.zeros(*shape, 1), torch.ones(shape, dtype=torch.bool),
            [group[:1] if sampling["temperature"] == 0 else group for group in groups],
        )  # fmt: skip

    return answer


@pytest.fixture
def judged(monkeypatch):
    """(summary, records) of given texts: problem i asks "i" and has the answer i."""

    def judge(*texts, task=TASK, samples=0):
        monkeypatch.setattr(held_out, "sample_rollouts", saying(*texts))
        monkeypatch.setattr(
            held_out, "prompt_of", lambda tokenizer, task, problem: problem.question
        )
        problems = [Problem(f"{i}", f"{i}", "") for i in range(1, len(texts) + 1)]
        args = make_args(max_completion_length=8, eval_batch_size=2, eval_samples=samples)
        model, tokenizer = SimpleNamespace(device="cpu"), SimpleNamespace(decode=str)
        records = evaluate(make_setup(model, args, None, tokenizer, task), problems)
        return summarize(records), records

    return judge


TEXTS = [written("1"), written("9"), "3", written("4"), "It is 5.", "six"]


def test_strict_lenient_and_format_are_counted_apart(judged):
    summary, records = judged(*TEXTS)
    for name, key, count in (
        ("accuracy", "correct", 2), ("lenient_accuracy", "lenient_correct", 4),
        ("format_rate", "format", 3),
    ):  # fmt: skip
        assert sum(record[key] for record in records) == count
        assert summary[name] == pytest.approx(count / 6)
        assert (summary[f"{name}_low"], summary[f"{name}_high"]) == wilson_interval(count, 6)
    assert [record["parsed"] for record in records] == ["1", "9", None, "4", None, None]
    assert [record["lenient_parsed"] for record in records] == ["1", "9", "3", "4", "5", None]


def test_accuracy_does_not_move_when_the_rewards_are_edited(judged):
    def flattering(completion, problem):
        return 100.0

    summary, _ = judged(*TEXTS, task=replace(TASK, reward_functions=[flattering]))
    ours, _ = judged(*TEXTS)
    assert summary["rewards/flattering"] == 100.0
    assert all(summary[key] == ours[key] for key in ours if not key.startswith("rewards/"))


def test_pass_at_k_is_the_share_of_questions_with_a_right_sample_among_k(judged):
    summary, records = judged(
        [written("1"), written("9"), "1", "8"], ["2"] * 4, [written("3")] * 4, samples=4
    )
    assert [len(record["samples"]) for record in records] == [4, 4, 4]
    strict = [[True, False, False, False], [False] * 4, [True] * 4]
    assert [[s["correct"] for s in record["samples"]] for record in records] == strict
    assert summary["pass@1"] == pytest.approx((1 / 4 + 0 + 1) / 3)
    assert summary["pass@2"] == pytest.approx((1 / 2 + 0 + 1) / 3)  # 3 of 6 pairs hold the first
    assert summary["pass@4"] == pytest.approx(2 / 3)
    assert summary["lenient_pass@1"] == pytest.approx((2 / 4 + 1 + 1) / 3)
    assert "pass@8" not in summary and "pass@3" not in summary
    assert (summary["pass@4_low"], summary["pass@4_high"]) == wilson_interval(2, 3)


def test_samples_come_from_the_policy_at_the_temperature_and_follow_seed_and_step(toy, accelerator):
    args = make_args(
        max_completion_length=8, eval_batch_size=4, eval_samples=2, temperature=0.7, seed=3
    )
    setup = make_setup(toy.policy, args, accelerator, toy.tokenizer)

    def answers(step, **flags):
        summary, records = evaluate_policy(with_args(setup, **flags), PROBLEMS, step)
        samples = [[s["completion"] for s in record.get("samples", [])] for record in records]
        assert summary.pop("seconds/evaluation") > 0
        return samples, [record["completion"] for record in records], summary

    samples, greedy, summary = answers(step=5)
    assert answers(step=5) == (samples, greedy, summary)
    assert answers(step=6)[0] != samples
    for problem, texts in zip(PROBLEMS, samples):  # of the seed, the step and the question alone
        seeds = [mixed_seed(mixed_seed(3, 5, "evaluation"), problem.question)]
        prompt = chat_prompt(toy.tokenizer, SYSTEM_PROMPT, problem.question)
        rollouts = sample_rollouts(toy.policy, toy.tokenizer, [prompt], 2, 8, 0.7, seeds)
        assert rollouts.texts == [texts]
    assert answers(step=5, eval_batch_size=100)[0] == samples
    without, alone, summary = answers(step=5, eval_samples=0)
    assert alone == greedy and not any(without) and "pass@1" not in summary


# --- what a run writes -------------------------------------------------------------------------


def test_the_final_table_shows_strict_lenient_format_intervals_and_p(judged, tmp_path):
    before, after = judged(*["0"] * 6)[0], {**judged(*TEXTS)[0], "mcnemar_p": 0.5}
    text = summary_table(tmp_path, before, after)
    rows = {line.split()[0]: line for line in text.splitlines() if line}
    assert "0.0% [0.0%, 39.0%]" in rows["accuracy"] and "33.3% [9.7%, 70.0%]" in rows["accuracy"]
    assert "66.7% [30.0%, 90.3%]" in rows["lenient_accuracy"]
    assert "50.0% [18.8%, 81.2%]" in rows["format_rate"]
    assert rows["mcnemar_p"].split() == ["mcnemar_p", "0.5"]
    assert "the exact test of accuracy against step 0" in text
    assert "mcnemar_p" not in "\n".join(evaluation_table({"a model": before}))
