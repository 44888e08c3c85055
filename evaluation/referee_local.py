"""A model on this machine as the referee: nothing is generated, two tokens are compared.

Letters: N asks, Q questions, G asks about one of them, R in a pass, C tokens, U distinct ones, D
hidden size.
"""

import copy
import hashlib
from dataclasses import replace
from itertools import groupby

import torch
from torch.nn.utils.rnn import pad_sequence

from evaluation.referee import Scale
from llms import chat_prompt, rendering_on
from sampling.turns import as_plain_text
from tasks.asks import SYSTEM
from training.head import capped_, head_of
from training.progress import progress
from training.shared_prefix import WITHOUT_GRADIENT, hidden_before_completions, micro_batches
from utils import UserError, context_of, release_freed_memory


class LocalReferee:
    """The log-odds of the two answers, from one forward pass over all asks.

    What asks about one question have in common, the question, and in a tournament every first text,
    is computed once, as the prompts and completions of training are.
    """

    scale = Scale()

    def __init__(self, model, tokenizer, accelerator, micro_batch_tokens, name):
        self.model, self.accelerator = model, accelerator
        self.tokenizer = copy.copy(tokenizer)  # the policy may think first, a referee answers
        rendering = rendering_on(tokenizer)
        arguments = {**rendering.arguments, "enable_thinking": False}
        self.tokenizer.rendering = replace(rendering, arguments=arguments)
        self.budget = WITHOUT_GRADIENT * micro_batch_tokens
        self.digest = weights_digest(model)
        self.name = f"{name} {self.digest}"
        self.tokens = {}  # {words: the ids that they begin with}
        for words in (("A", "B"), ("Yes", "No")):
            ids = [tokenizer(word, add_special_tokens=False).input_ids[0] for word in words]
            if ids[0] == ids[1]:
                raise UserError(f"--referee {name}: to its tokenizer {words[0]} and {words[1]} "
                                "begin alike; name another model")  # fmt: skip
            self.tokens[words] = ids

    @torch.no_grad()
    def log_odds(self, asks):
        """N numbers, None for an ask that is longer than the model's context."""
        texts = [as_plain_text(self.tokenizer, ask.text) for ask in asks]
        prompts = [chat_prompt(self.tokenizer, SYSTEM, text) for text in texts]
        room = context_of(self.model.config.to_dict())
        fit = [n for n in range(len(asks)) if len(prompts[n]) < room]
        fit.sort(key=lambda n: asks[n].question)
        groups = [[*of_one] for _, of_one in groupby(fit, key=lambda n: asks[n].question)]
        answers = [None] * len(asks)
        if groups:
            values = self._differences(asks, prompts, groups)
            for (group, place), value in values.items():
                answers[groups[group][place]] = value
        release_freed_memory(self.model.device)
        return answers

    def _differences(self, asks, prompts, groups):
        """{(group, place in it): log-odds}. groups: lists of places in asks and prompts."""
        device, most = self.model.device, max(map(len, groups))
        shared = [common([prompts[n] for n in group]) for group in groups]
        starts = [
            torch.tensor(prompts[group[0]][:length], device=device)
            for group, length in zip(groups, shared)
        ]  # Q tensors (P,)
        lengths, rests = [], []
        for group, start in zip(groups, shared):
            # The last one predicts nothing and may be any: what counts is the state before it.
            rest = [[*prompts[n][start:], 0] for n in group] + [[]] * (most - len(group))
            lengths.append([len(ids) for ids in rest])
            rests += [torch.tensor(ids, dtype=torch.long, device="cpu") for ids in rest]
        ids = pad_sequence(rests, batch_first=True).to(device)  # (Q·G, C)
        head, values = head_of(self.model), {}
        batches = micro_batches(starts, lengths, self.budget, ids)
        for batch in batches:
            with self.accelerator.autocast():
                hidden, packing = hidden_before_completions(
                    self.model, batch, ids.index_select(0, batch.rows)
                )  # (U, D)
            ends = torch.tensor(batch.lengths, device="cpu").cumsum(0) - 1  # (R,), of scored ones
            last = hidden.index_select(0, packing.same.index_select(0, ends.to(device)))  # (R, D)
            places = [divmod(row, most) for row in batch.rows.tolist()]
            pairs = [self.tokens[asks[groups[q][g]].words] for q, g in places]
            last = last.to(head.weight.dtype) * head.scale
            sides = (torch.tensor(side, device=device) for side in zip(*pairs))  # (R,) each
            first, second = (
                capped_(torch.linalg.vecdot(last, head.weight.index_select(0, side)), head.cap)
                for side in sides
            )  # (R,) each, in fp32
            values |= dict(zip(places, (first - second).tolist()))
            progress.tick(1, "passes", of=len(batches))
        return values


def common(prompts):
    """How many ids all of them begin with, and less than any has."""
    first, last = min(prompts), max(prompts)  # what these two share all do
    differing = (at for at, (one, other) in enumerate(zip(first, last)) if one != other)
    return min(next(differing, len(first)), min(map(len, prompts)) - 1)


def weights_digest(model):
    """Some letters that change with the weights: the first numbers of every tensor, but for those
    of an adapter, which a referee has turned off."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            numbers = parameter.detach().flatten()[:8].float().cpu()
            digest.update(numbers.numpy().tobytes())
    return digest.hexdigest()[:12]
