"""The other engine, held to what sampling/groups.py promises."""

import copy

import pytest
import torch
from conftest import FAMILIES, make_args, make_model, make_setup, make_tokenizer
from toys import Words, assert_stops_end_completions, group_logprobs, naive, seeds

from rldatasets import Problem
from sampling import groups
from sampling.groups import sample_groups, sample_rollouts
from sampling.paged import engine_model, sample_rollouts_paged
from utils import UserError

PROMPTS = [[5, 9, 3], [8, 2], [7, 7, 1, 3, 2, 4, 11]]


def poison(model):
    config = model.generation_config
    config.do_sample, config.top_k, config.top_p, config.repetition_penalty = True, 2, 0.3, 1.5
    config.temperature, config.max_new_tokens, config.min_new_tokens = 0.2, 3, 2


@pytest.mark.parametrize(("family", "temperature"), zip(FAMILIES, (0.7, 1.0, 1.3)))
def test_logprobs_match_a_naive_forward_at_the_sampling_temperature(family, temperature):
    model = make_model(family, vocab_size=40, attention_dropout=0.5)
    poison(model)
    rollouts = sample_rollouts_paged(model, Words(0), PROMPTS, 4, 12, temperature, seeds())
    assert [ids.tolist() for ids in rollouts.prompt_ids] == PROMPTS
    assert rollouts.completion_ids.shape == (3, 4, 12)
    for question in range(3):
        error = naive(model, rollouts, question, temperature) - rollouts.logprobs[question]
        assert error[rollouts.completion_mask[question]].abs().max() < 1e-4


def test_the_distribution_is_the_model_s_whatever_its_generation_config_says():
    """Of 60 tokens all turn up: a top_k left unsaid would be 2 by the model's, 50 by default."""
    model = make_model(vocab_size=60, initializer_range=0.02)
    poison(model)
    group_size, calls = 700, 2
    counts = torch.zeros(60)
    for call in range(calls):
        rollouts = sample_rollouts_paged(
            model, Words(99), [[3, 3, 1]], group_size, 1, 1.3, seeds(call)
        )
        counts += torch.bincount(rollouts.completion_ids.flatten(), minlength=60)
    draws = group_size * calls
    with torch.no_grad():
        expected = (model(torch.tensor([[3, 3, 1]])).logits[0, -1] / 1.3).softmax(-1)
    assert expected.min() > 0.005
    assert (counts > 0).all()
    assert ((counts / draws - expected).abs() < 4.5 * (expected / draws).sqrt()).all()


def test_masks_end_with_the_first_of_either_stop_token_and_go_by_position():
    model = make_model(vocab_size=10, initializer_range=0.1)
    model.generation_config.eos_token_id = [1]
    settings = (model, Words(0), [[0, 5, 0], [1, 4]], 64, 15, 1.0)
    rollouts = sample_rollouts_paged(*settings, seeds())
    ours = sample_rollouts(*settings, seeds())
    for name in ("completion_ids", "completion_mask", "logprobs", "finished"):
        assert getattr(rollouts, name).dtype == getattr(ours, name).dtype
        assert getattr(rollouts, name).shape == getattr(ours, name).shape
    assert rollouts.completion_mask.shape[-1] == 15
    assert_stops_end_completions(rollouts, 15)
    assert (rollouts.logprobs[~rollouts.completion_mask] == 0).all()
    assert rollouts.texts[1][3] == " ".join(
        str(i) for i in rollouts.completion_ids[1, 3].tolist() if i
    )


def test_same_seed_same_completions_and_torch_s_own_generator_is_left_alone():
    model = make_model()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second, third = (
        sample_rollouts_paged(model, Words(0), PROMPTS, 4, 12, 1.0, seeds(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first.completion_ids, second.completion_ids)
    assert torch.equal(first.logprobs, second.logprobs)
    assert not torch.equal(first.completion_ids, third.completion_ids)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "shared_prefix"])
def test_the_model_is_left_as_it_was(attention):
    model = make_model(vocab_size=20)
    model.set_attn_implementation(attention)
    poison(model)
    config, generation = copy.deepcopy((model.config, model.generation_config))
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    attributes = set(vars(model))
    sample_rollouts_paged(model, Words(0), PROMPTS, 2, 4, 1.0, seeds())
    assert model.config._attn_implementation == attention
    assert model.config.to_dict() == config.to_dict()
    assert model.generation_config.to_dict() == generation.to_dict()
    assert set(vars(model)) == attributes
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_under_bf16_autocast_engine_and_trainer_agree():
    model = make_model(vocab_size=40, initializer_range=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        rollouts = sample_rollouts_paged(model, Words(0), PROMPTS, 4, 20, 1.0, seeds())
        for question in range(3):
            ids = rollouts.completion_ids[question]
            scored = group_logprobs(model, rollouts.prompt_ids[question], ids, 1.0)
            gap = (scored - rollouts.logprobs[question])[rollouts.completion_mask[question]]
            assert gap.abs().max() < 0.05


def test_under_autocast_the_engine_keeps_its_positions_exact():
    """Rotary frequencies in bf16 would be half a radian off after a thousand tokens."""
    model = make_model()
    with torch.autocast("cpu", torch.bfloat16):
        engine = engine_model(model)
    dtypes = {name: weight.dtype for name, weight in engine.named_parameters()}
    assert dtypes.pop("lm_head.weight") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}
    for (_, ours), (_, theirs) in zip(engine.named_buffers(), model.named_buffers(), strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("flags", "engine", "filters"),
    [
        ({"sampler": "paged"}, "sample_rollouts_paged", ()),
        ({"sampler": "fused", "stop": ["#"]}, "sample_rollouts", ((5, 1, 0), True, ["#"])),
        ({"sampler": "shared_prefix"}, "sample_rollouts", ((5, 1, 0), False, [])),
    ],
)
def test_the_flags_choose_the_engine_of_a_training_step(
    flags, engine, filters, accelerator, monkeypatch
):
    called = []
    monkeypatch.setattr(
        groups, engine, lambda *arguments, **_: called.append(arguments) or "rollouts"
    )
    monkeypatch.setattr(groups, "joined_rollouts", lambda parts: "".join(parts))
    args = make_args(top_k=5, temperature=0.8, **flags)
    setup = make_setup(None, args, accelerator, make_tokenizer())
    rollouts = sample_groups(setup, [Problem("1 + 1?", "2", "1 + 1 = 2")], [7])
    assert rollouts == "rollouts"
    [(model, _, prompts, group_size, tokens, temperature, source, *rest)] = called
    assert (model, len(prompts), group_size, tokens, temperature) == (None, 1, 4, 16, 0.8)
    assert source == [7] and tuple(rest) == filters


@pytest.mark.gpu
def test_on_a_gpu_engine_and_trainer_agree():
    model = make_model(vocab_size=40, initializer_range=0.1, head_dim=64).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        first, second = (
            sample_rollouts_paged(model, Words(0), PROMPTS, 4, 20, 1.0, seeds(1)) for _ in range(2)
        )
        for question in range(3):
            ids = first.completion_ids[question]
            scored = group_logprobs(model, first.prompt_ids[question], ids, 1.0)
            gap = (scored - first.logprobs[question])[first.completion_mask[question]]
            assert gap.abs().max() < 0.05
    assert torch.equal(first.completion_ids, second.completion_ids)


def test_what_the_engine_cannot_do_is_one_line(capfd):
    with pytest.raises(UserError, match=r"^--sampler paged: "):
        sample_rollouts_paged(make_model(), Words(0), [[5]], 2, 4, 1.0, seeds())
