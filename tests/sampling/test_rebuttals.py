"""Completions that answer each other: who hears whom, what is trained, and what stays the same."""

from dataclasses import replace

import pytest
import torch
from conftest import TASK, make_args, make_model, make_setup, make_tokenizer
from toys import naive

from evaluation.held_out import evaluate
from launch.parser import parse_args
from rldatasets import Problem, completion_of
from sampling.groups import sample_groups
from sampling.turns import between_turns, told_ids
from tasks import load_task

PROBLEMS = [
    Problem(f"{side} of {n}?{' Yes?' * side * (5 - n)}", "", "", {"rival": None})
    for n in range(3)
    for side in (0, 1)
]
for one, other in zip(PROBLEMS[::2], PROBLEMS[1::2]):
    one.extra["rival"], other.extra["rival"] = other.question, one.question


def rebut(problem, turns, others):
    rival = others.get(problem.extra["rival"])
    return rival and f"{len(turns)}: {rival[-1][:9]}"


@pytest.fixture(scope="module")
def talkative():
    """A model that ends a turn after a few tokens, and its tokenizer."""
    tokenizer = make_tokenizer()
    model = make_model("qwen2", torch.float64, len(tokenizer), tie_word_embeddings=False)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 4
    return model, tokenizer


def setup_of(talkative, **flags):
    model, tokenizer = talkative
    args = {"group_size": 3, "max_completion_length": 90, "eval_batch_size": 2, **flags}
    task = replace(TASK, rebut=rebut, together=2)
    return make_setup(model, make_args(**args), tokenizer=tokenizer, task=task)


def sampled(talkative, problems=PROBLEMS, **flags):
    seeds = [100 + PROBLEMS.index(problem) for problem in problems]
    return sample_groups(setup_of(talkative, **flags), problems, seeds)


def each(rollouts):
    return [(q, g, text) for q, texts in enumerate(rollouts.texts) for g, text in enumerate(texts)]


def test_each_side_hears_what_the_other_said_in_its_place_of_the_group(talkative):
    openings, heard = sampled(talkative), sampled(talkative, rebuttals=2)
    answered = 0
    for q, g, text in each(heard):
        turns = getattr(text, "turns", (text,))
        assert turns[0] == openings.texts[q][g]
        rival = getattr(heard.texts[q ^ 1][g], "turns", (heard.texts[q ^ 1][g],))
        for n in range(1, len(turns), 2):  # a rival that was cut off is heard as far as it came
            assert turns[n] == f"{n}: {rival[:n][-1][:9]}"
        answered += len(turns) == 5
        assert len(turns) > 1 or not openings.finished[q, g] or not heard.finished[q, g]
    assert answered > 5


def test_log_probs_are_those_of_transformers_forward_and_the_mask_is_exact(talkative):
    model, tokenizer = talkative
    rollouts, between = sampled(talkative, rebuttals=2), between_turns(tokenizer)
    mask = rollouts.completion_mask
    for q in range(len(PROBLEMS)):
        reference = naive(model, rollouts, q, 1.0)  # (G, C)
        assert (rollouts.logprobs[q] - reference)[mask[q]].abs().max() < 1e-5
        assert rollouts.logprobs[q][~mask[q]].abs().max() == 0
    for q, g, text in each(rollouts):
        ids, expected = rollouts.completion_ids[q, g].tolist(), []
        for i, turn in enumerate(getattr(text, "turns", (text,))):
            at = len(expected)
            if i % 2:
                told = told_ids(tokenizer, between, turn)[1:]
                assert ids[at : at + len(told)] == told
                expected += [False] * len(told)
            else:
                stop = ids[at:].index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in ids[
                    at:] else int(mask[q, g].nonzero().max()) + 1 - at  # fmt: skip
                assert tokenizer.decode(ids[at : at + stop], skip_special_tokens=True) == turn
                expected += [True] * stop
        assert mask[q, g].tolist() == expected + [False] * (len(ids) - len(expected))


def test_a_debate_is_the_same_whatever_is_sampled_beside_it(talkative):
    together = sampled(talkative, rebuttals=1)
    apart = sampled(talkative, PROBLEMS[2:4], rebuttals=1)
    in_parts = sampled(talkative, rebuttals=1, sampling_batch_size=3)  # a side would fill it
    assert together.texts == in_parts.texts and together.texts[2:4] == apart.texts
    assert any(hasattr(text, "turns") for _, _, text in each(together))


def test_no_episode_is_longer_than_it_may_be(talkative):
    for most in (12, 30, 45):
        openings = sampled(talkative, max_completion_length=most)
        rollouts = sampled(talkative, rebuttals=2, max_completion_length=most)
        assert rollouts.completion_ids.shape[-1] <= most
        for q, g, text in each(rollouts):
            if not openings.finished[q, g]:  # which is cut off as it was
                assert text == openings.texts[q][g] and not rollouts.finished[q, g]
    assert len({getattr(text, "turns", ())[1:] for _, _, text in each(rollouts)}) > 1


def test_held_out_sides_meet_though_their_prompts_differ_in_length(talkative):
    flags = {"rebuttals": 1, "eval_samples": 0}
    in_pairs, at_once = (
        [getattr(completion_of(record), "turns", ()) for record in evaluate(
            setup_of(talkative, eval_batch_size=size, **flags), PROBLEMS)]
        for size in (3, 6)
    )  # fmt: skip
    assert in_pairs == at_once and len([turns for turns in at_once if turns]) > 2


def test_without_the_other_side_nobody_answers(talkative):
    alone = sampled(talkative, PROBLEMS[:1], rebuttals=1)
    assert alone.texts == sampled(talkative).texts[:1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dataset_name", "tell"], "--rebuttals 1: in this task no side answers another"),
        (["--dataset_name", "calculator"], "--rebuttals 1: in this task no side"),
        (["--dataset_name", "debate", "--sampler", "paged"], "--sampler paged: cannot go on after"),
        ([], "--rebuttals 1: no side answers another in --dataset_name arithmetic"),
    ],
)
def test_rebuttals_of_nobody_are_refused(flags, words, tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_args(["--preset", "cpu", "--rebuttals", "1", "--output_dir", str(tmp_path), *flags])
    [line] = capsys.readouterr().err.strip().splitlines()[-1:]
    assert words in line and len(line) <= 200


def test_debaters_hear_each_other_and_the_referee_reads_both_turns():
    flags = {"dataset_name": "debate", "dataset_path": None, "evaluator": None, "seed": 0}
    task = load_task(make_args(**flags))
    one, other = task.problems("test")[:2]
    said = {one.question: ("It is so.",), other.question: ("It is not.",)}
    assert task.rebut(one, said[one.question], said).startswith("Your opponent says: It is not.")
    assert task.rebut(one, said[one.question], {}) is None
