"""What an update did to every token, against a naive scoring before and after it."""

import pytest
import torch
from conftest import make_args, make_model
from test_llms import naive_logprobs
from test_sampler import Words, seeds

from llms import frozen_copy
from sampling.groups import sample_rollouts
from training.token_log import is_watched, watch_tokens
from utils import Stopwatch


class Tokenizer(Words):
    def batch_decode(self, rows, **options):
        return [" ".join(f"w{i}" for i in row) for row in rows]


class Saved:
    def save_tokens(self, step, records):
        self.step, self.records = step, records


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
    run, args = Saved(), make_args(temperature=0.8, micro_batch_tokens=10, num_train_iters=3)
    reference, stopwatch = frozen_copy(make_model(vocab_size=14, seed=1)), Stopwatch()
    rest = (rollouts, advantages, args, accelerator, stopwatch)
    save = watch_tokens(run, 1, model, reference if kl else None, Tokenizer(0), *rest)
    expected = {"logprobs_before": model, "logprobs_after": None, "ref_logprobs": reference}
    ids = rollouts.completion_ids[1]

    def naive(model):
        with torch.no_grad():
            return naive_logprobs(model, rollouts.prompt_ids[1], ids, 0.8)

    expected = {"old_logprobs": rollouts.logprobs[1], "logprobs_before": naive(model)}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    save()
    expected["logprobs_after"] = naive(model)
    if kl:
        expected["ref_logprobs"] = naive(reference)
    assert run.step == 1 and stopwatch.seconds["watching"] > 0
    assert [record["row"] for record in run.records] == [3, 4, 5]
    for g, record in enumerate(run.records):
        length = int(rollouts.completion_mask[1, g].sum())
        assert record["tokens"] == [f"w{i}" for i in ids[g, :length].tolist()]
        assert record.keys() - {"row", "tokens"} == expected.keys()
        for key, values in expected.items():
            assert record[key] == pytest.approx(values[g, :length].tolist(), abs=1e-4), key
    assert run.records[0]["logprobs_after"] != run.records[0]["logprobs_before"]


def test_other_steps_cost_nothing(accelerator):
    args = make_args(num_train_iters=10)
    save = watch_tokens(None, 1, None, None, None, None, None, args, accelerator, Stopwatch())
    assert save() is None
