"""What an update did to every token, against a naive scoring before and after it."""

import pytest
import torch
from conftest import make_args, make_model, make_setup
from toys import Words, naive_logprobs, seeds

from llms import frozen_copy
from sampling.groups import sample_rollouts
from training.token_log import is_watched, watch_tokens


class Tokenizer(Words):
    def batch_decode(self, rows, **options):
        return [" ".join(f"w{i}" for i in row) for row in rows]


def test_the_first_the_middle_and_the_last_step_are_watched():
    assert [step for step in range(20) if is_watched(step, 20)] == [0, 9, 19]
    assert [step for step in range(2) if is_watched(step, 2)] == [0, 1]
    assert is_watched(0, 1)


@pytest.mark.parametrize("kl", [False, True])
def test_the_log_probs_are_those_before_and_after_the_update(kl, accelerator):
    model = make_model(vocab_size=14)
    prompts = [[5, 9, 3], [8, 8]]
    rollouts = sample_rollouts(model, Tokenizer(0), prompts, 3, 8, 0.8, seeds())
    advantages = torch.tensor([[0.0, 0.0, 0.0], [1.0, -0.5, -0.5]])
    args = make_args(temperature=0.8, micro_batch_tokens=10, num_train_iters=3)
    reference = frozen_copy(make_model(vocab_size=14, seed=1))
    setup = make_setup(model, args, accelerator, Tokenizer(0), reference=reference if kl else None)
    watched = watch_tokens(setup, 1, rollouts, advantages)
    ids = rollouts.completion_ids[1]

    def naive(model):
        with torch.no_grad():
            return naive_logprobs(model, rollouts.prompt_ids[1], ids, 0.8)

    expected = {"sampled_logprobs": rollouts.logprobs[1], "logprobs_before": naive(model)}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    records = watched()
    expected["logprobs_after"] = naive(model)
    if kl:
        expected["ref_logprobs"] = naive(reference)
    assert setup.stopwatch.seconds["token_log"] > 0
    assert [record["row"] for record in records] == [3, 4, 5]
    for g, record in enumerate(records):
        length = int(rollouts.completion_mask[1, g].sum())
        assert record["tokens"] == [f"w{i}" for i in ids[g, :length].tolist()]
        assert record.keys() - {"row", "tokens"} == expected.keys()
        for key, values in expected.items():
            assert record[key] == pytest.approx(values[g, :length].tolist(), abs=1e-4), key
    assert records[0]["logprobs_after"] != records[0]["logprobs_before"]


def test_other_steps_cost_nothing(accelerator):
    setup = make_setup(None, make_args(num_train_iters=10), accelerator)
    assert watch_tokens(setup, 1, None, None)() == []
