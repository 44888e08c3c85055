"""Sampling: the right distribution, the right masks, the right log-probs."""

import itertools
from dataclasses import replace

import pytest
import torch
from conftest import FAMILIES, make_args, make_model, make_setup, make_tokenizer
from toys import (
    HostTensors,
    Waits,
    Words,
    assert_stops_end_completions,
    generator,
    group_logprobs,
    naive,
    seeds,
)

from rldatasets import Problem
from sampling import groups
from sampling.decoder import Decoder
from sampling.drawing import Filters, sample_tokens
from sampling.groups import sample_groups, sample_rollouts
from sampling.rollouts import joined_rollouts


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_logprobs_match_a_naive_forward_at_the_sampling_temperature(family, temperature):
    model = make_model(family, vocab_size=40)
    prompts = [[5, 9, 3], [8], [7, 7, 1, 30, 22, 4, 11]]  # unequal: the batch is left-padded
    rollouts = sample_rollouts(model, Words(0), prompts, 4, 12, temperature, seeds())
    for question in range(3):
        error = naive(model, rollouts, question, temperature) - rollouts.logprobs[question]
        assert error[rollouts.completion_mask[question]].abs().max() < 1e-4


def test_a_group_is_the_same_whatever_shares_its_batch():
    model = make_model(dtype=torch.float64, vocab_size=12)
    prompts = [[5, 9, 3], [7, 7, 1, 3, 2, 4], [5, 9, 3]]
    together = sample_rollouts(model, Words(0), prompts, 8, 20, 1.0, [7, 8, 9])
    for question, seed in enumerate([7, 8, 9]):
        alone = sample_rollouts(model, Words(0), [prompts[question]], 8, 20, 1.0, [seed])
        assert alone.texts[0] == together.texts[question]
    assert together.texts[0] != together.texts[2]


def test_a_prompt_samples_the_same_beside_a_longer_one():
    """Left padding, and rows that finish earlier, change nothing (fp64: to rounding)."""
    model = make_model(dtype=torch.float64, vocab_size=12)
    prompts = [[5, 9, 3], [7, 7, 1, 3, 2, 4, 11, 6, 6, 6]]
    together = sample_rollouts(model, Words(0), prompts, 8, 20, 1.0, seeds(3))
    uniforms = torch.cat(
        [torch.rand((20, 8), dtype=torch.float64, generator=generator(3000 + i)) for i in range(2)],
        dim=1,
    )

    for question, prompt in enumerate(prompts):
        rows = slice(8 * question, 8 * question + 8)
        for row in range(8):
            ids = list(prompt)
            for t in range(20):
                logits = model(torch.tensor([ids])).logits[0, -1].detach()
                cumulative = logits.softmax(-1).cumsum(-1)
                token = int((cumulative <= uniforms[t, rows][row] * cumulative[-1]).sum())
                ids.append(token)
                if token == 0:
                    break
            drawn = together.completion_ids[question, row][together.completion_mask[question, row]]
            assert drawn.tolist() == ids[len(prompt) :]


def test_the_model_s_own_generation_config_does_not_leak_in():
    model = make_model(vocab_size=8, initializer_range=0.15)
    config = model.generation_config
    config.do_sample, config.top_k, config.top_p, config.repetition_penalty = True, 2, 0.3, 1.5
    config.temperature = 0.2
    draws = 4000
    rollouts = sample_rollouts(model, Words(99), [[3, 3, 1]], draws, 1, 1.0, seeds())
    counts = torch.bincount(rollouts.completion_ids.flatten(), minlength=8) / draws
    expected = model(torch.tensor([[3, 3, 1]])).logits[0, -1].softmax(-1)
    assert expected.min() > 0.01  # every token has to turn up, the poisoned top_k would keep two
    assert (counts - expected).abs().max() < 4 * (0.25 / draws) ** 0.5


def test_greedy_is_the_true_argmax_despite_a_poisoned_config():
    model = make_model(vocab_size=20)
    config = model.generation_config
    config.do_sample, config.repetition_penalty, config.top_k = True, 5.0, 2
    rollouts = sample_rollouts(model, Words(99), [[3, 3, 1]], 2, 10, temperature=0)
    ids = [3, 3, 1]
    for _ in range(10):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert rollouts.completion_ids[0].tolist() == [ids[3:], ids[3:]]


def test_masks_end_with_the_first_of_either_stop_token_and_go_by_position():
    """Token 0 is stop and padding at once, and stands in the prompt too; token 1 stops as well."""
    model = make_model(vocab_size=10, initializer_range=0.1)
    model.generation_config.eos_token_id = [1]
    rollouts = sample_rollouts(model, Words(0), [[0, 5, 0], [1, 4]], 64, 15, 1.0, seeds())
    assert_stops_end_completions(rollouts, 15)
    assert (rollouts.logprobs[~rollouts.completion_mask] == 0).all()


def test_looking_for_finished_rows_less_often_changes_nothing(monkeypatch):
    """A GPU looks every 16 tokens; rows that go on meanwhile must leave no trace."""
    model = make_model(vocab_size=12)

    def run():
        return sample_rollouts(model, Words(0), [[5, 2], [3]], 16, 24, 1.0, seeds(1))

    monkeypatch.setattr(groups, "SHARING", set())  # as on a GPU
    often = run()
    monkeypatch.setattr(groups, "LOOK_EVERY", {"cpu": 16})
    rarely = run()
    assert torch.equal(often.completion_ids, rarely.completion_ids)
    assert torch.equal(often.completion_mask, rarely.completion_mask)
    assert torch.allclose(often.logprobs, rarely.logprobs, atol=1e-5)


def test_same_seed_same_completions_and_another_seed_others():
    model = make_model()
    first, second, third = (
        sample_rollouts(model, Words(0), [[5, 2]], 4, 12, 1.0, seeds(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first.completion_ids, second.completion_ids)
    assert not torch.equal(first.completion_ids, third.completion_ids)


def test_the_ids_are_those_sampled_and_the_texts_are_only_for_reading():
    """Bytes sampled at random seldom are what the tokenizer would make of their own text."""
    tokenizer = make_tokenizer()
    model = make_model(vocab_size=len(tokenizer), initializer_range=0.02)
    rollouts = sample_rollouts(model, tokenizer, [[65, 66]], 8, 30, 1.0, seeds())
    lengths = rollouts.completion_mask.sum(-1)[0].tolist()
    encoded = [tokenizer(text, add_special_tokens=False).input_ids for text in rollouts.texts[0]]
    rows = [row[:n] for row, n in zip(rollouts.completion_ids[0].tolist(), lengths)]
    assert encoded != rows
    for row, text in zip(rows, rollouts.texts[0]):
        assert tokenizer.decode(row, skip_special_tokens=True) == text


def frequencies(filters):
    logits = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]).log().expand(20000, -1)
    uniforms = torch.rand(20000, dtype=torch.float64, generator=generator())
    tokens, logprobs = sample_tokens(logits, uniforms, 1.0, filters)
    assert torch.allclose(logprobs, logits.gather(-1, tokens[:, None])[:, 0], atol=1e-6)
    return torch.bincount(tokens, minlength=5) / 20000


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, [0.4, 0.3, 0.15, 0.1, 0.05]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"top_k": 99}, [0.4, 0.3, 0.15, 0.1, 0.05]),
        ({"top_p": 0.6}, [4 / 7, 3 / 7, 0, 0, 0]),  # 0.4 alone falls short, so 0.3 joins it
        ({"min_p": 0.3}, [40 / 85, 30 / 85, 15 / 85, 0, 0]),  # at least 0.3 x 0.4
        ({"top_k": 3, "min_p": 0.5}, [4 / 7, 3 / 7, 0, 0, 0]),
    ],
)
def test_filters_keep_the_tokens_they_promise(filters, expected):
    observed = frequencies(Filters(**filters))
    assert (observed - torch.tensor(expected)).abs().max() < 0.015
    assert (observed[torch.tensor(expected) == 0] == 0).all()


def test_temperature_sharpens():
    logits = torch.tensor([0.6, 0.4]).log().expand(20000, -1)
    uniforms = torch.rand(20000, dtype=torch.float64, generator=generator())
    tokens, _ = sample_tokens(logits, uniforms, 0.5)
    assert (tokens == 0).float().mean().item() == pytest.approx(0.36 / 0.52, abs=0.015)


@pytest.mark.parametrize("vocabulary", [5, 128, 300])
def test_a_draw_falls_where_the_plain_cumulative_sum_puts_it(vocabulary):
    logits = 3 * torch.randn(500, vocabulary, dtype=torch.float64, generator=generator())
    uniforms = torch.rand(500, dtype=torch.float64, generator=generator(1))
    tokens, logprobs = sample_tokens(logits, uniforms, 0.8)
    log_probs = (logits / 0.8).log_softmax(-1)
    expected = (log_probs.exp().cumsum(-1) <= uniforms[:, None]).sum(-1)
    assert torch.equal(tokens, expected)
    assert torch.allclose(logprobs, log_probs.gather(-1, tokens[:, None])[:, 0], atol=1e-12)


def test_extreme_draws_stay_inside_the_vocabulary_and_off_impossible_tokens():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]] * 2)
    uniforms = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert sample_tokens(logits, uniforms, 1.0)[0].tolist() == [1, 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_under_bf16_autocast_sampler_and_trainer_still_agree(family):
    """What a GPU runs: a bf16 copy of the weights samples, bf16 passes over fp32 weights train."""
    model = make_model(family, vocab_size=40, initializer_range=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        rollouts = sample_rollouts(model, Words(0), [[5, 9, 3], [8]], 4, 20, 1.0, seeds())
        for question in range(2):
            ids = rollouts.completion_ids[question]
            scored = group_logprobs(model, rollouts.prompt_ids[question], ids, 1.0)
            gap = (scored - rollouts.logprobs[question])[rollouts.completion_mask[question]]
            assert scored.dtype == torch.float32
            assert gap.abs().max() < 0.05
    assert rollouts.logprobs.dtype == torch.float32


def test_dropout_in_the_config_does_not_reach_sampling():
    model = make_model("llama", attention_dropout=0.5, vocab_size=40)
    rollouts = sample_rollouts(model, Words(0), [[5, 9, 3]], 4, 12, 1.0, seeds())
    error = naive(model, rollouts, 0, 1.0) - rollouts.logprobs[0]
    assert error[rollouts.completion_mask[0]].abs().max() < 1e-4


def test_draws_joined_are_padded_and_otherwise_unchanged():
    model = make_model(vocab_size=12)
    parts = [
        sample_rollouts(model, Words(0), prompts, 3, length, 1.0, seeds(length))
        for prompts, length in (([[5, 2], [3]], 4), ([[7]], 9))
    ]
    joined = joined_rollouts(parts)
    longest = max(part.completion_ids.shape[-1] for part in parts)
    assert joined.completion_ids.shape == (3, 3, longest)
    assert [ids.tolist() for ids in joined.prompt_ids] == [[5, 2], [3], [7]]
    assert joined.texts == parts[0].texts + parts[1].texts
    first = parts[0].completion_mask.shape[-1]
    for name in ("completion_ids", "completion_mask", "logprobs"):
        whole = getattr(joined, name)
        assert torch.equal(whole[:2, :, :first], getattr(parts[0], name))
        assert torch.equal(whole[2:], getattr(parts[1], name))
        assert not whole[:2, :, first:].any()
    assert torch.equal(joined.finished, torch.cat([part.finished for part in parts]))
    # Of parts some of which show nothing, as those of several processes may be.
    assert joined.pictures is None
    showing = replace(parts[0], pictures=["a picture", None])
    assert joined_rollouts([showing, parts[1]]).pictures == ["a picture", None, None]
    assert joined_rollouts([parts[1], showing]).pictures == [None, "a picture", None]


# --- what a GPU would have to wait for ---------------------------------------------------------


def test_between_two_looks_nothing_waits_for_the_device(monkeypatch):
    """One wait per look, none before the first token, two for the texts at the end."""
    monkeypatch.setattr(groups, "LOOK_EVERY", {"cpu": 16})
    monkeypatch.setattr(groups, "SHARING", set())  # as on a GPU
    events = []
    step = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda *args: events.append("step") or step(*args))
    model = make_model(vocab_size=30)
    with HostTensors(events), Waits(events):
        rollouts = sample_rollouts(
            model,
            Words(0),
            [[5, 2], [3]],
            8,
            200,
            0.9,
            seeds(9),
            Filters(20, 0.9, 0.01),
        )
    lengths = rollouts.completion_mask.sum(-1)
    assert lengths.min() < 16 and 48 < lengths.max() < 180  # rows are dropped, then none is left
    steps = [at for at, event in enumerate(events) if event == "step"]
    between = [events[start + 1 : stop] for start, stop in itertools.pairwise(steps)]
    assert between == [["cpu"] if n % 16 == 0 else [] for n in range(2, len(steps) + 1)]
    assert events[: steps[0]] == []
    assert events[steps[-1] + 1 :] == ["cpu", "tolist", "tolist"]


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.item(), lambda x: bool(x > 0), lambda x: x.view(1).nonzero(), lambda x: x.cpu(),
        lambda x: x.view(1)[x.view(1) > 0], lambda x: x.tolist(), lambda x: x.view(1).unique(),
        lambda x: torch.where(x > 0), lambda x: torch.tensor(1.0, device=x.device) + x,
        lambda x: x.view(1).masked_select(x.view(1) > 0), lambda x: torch.isin(x, x),
    ],
)  # fmt: skip
def test_the_modes_above_notice_what_waits(wait):
    events = []
    with torch.inference_mode(), HostTensors(events), Waits(events):
        wait(torch.ones((), device=torch.device("cpu")))
    assert events


# --- a step's groups ----------------------------------------------------------------------------


def test_a_step_is_sampled_in_batches_of_whole_groups(accelerator, monkeypatch):
    tokenizer = make_tokenizer()
    model = make_model(vocab_size=len(tokenizer))
    problems = [Problem(f"{n}+{n}", str(2 * n), "") for n in range(5)]
    args = make_args(sampling_batch_size=9, max_completion_length=6)
    setup = make_setup(model, args, accelerator, tokenizer)
    asked, sample = [], groups.sample_rollouts
    monkeypatch.setattr(
        groups,
        "sample_rollouts",
        lambda *inputs, **more: asked.append(inputs[2]) or sample(*inputs, **more),
    )
    rollouts = sample_groups(setup, problems, range(5))
    assert [len(prompts) for prompts in asked] == [2, 2, 1]
    prompts = [ids for prompts in asked for ids in prompts]
    assert [ids.tolist() for ids in rollouts.prompt_ids] == prompts
    assert len({tuple(map(tuple, texts)) for texts in rollouts.texts}) == 5  # no draw twice
    assert rollouts.completion_mask.shape[:2] == (5, 4)
    args.sampling_batch_size = 0
    assert sample_groups(setup, problems, range(5)).texts == rollouts.texts
