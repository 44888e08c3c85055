"""The policy as the sampler runs it where decoder.py is not written for it: by its own layers.

Transformers' forward pass and cache, which know every family's windows, norms and embeddings. It
takes longer than decoder.py: every row has a copy of its prompt's keys and values, and the cache is
written anew at every token. What stays: a prompt is read once per question, equal completions share
a row, finished ones are dropped, and the draws and log-probs are groups.py's.

Letters as in decoder.py.
"""

import numpy as np
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from sampling.decoder import left_padded
from training.head import head_of
from training.lean_layers import checkpointed
from training.shared_prefix import own_attention
from utils import UserError, to_device

# Families that decoder.py computes as transformers does; tests/sampling/test_families.py.
WRITTEN_OUT = {"qwen2", "qwen3", "llama", "mistral", "qwen2_5_vl_text", "qwen3_vl_text"}


def is_written_out(config):
    """Whether decoder.py does what such a model does: one of these families, without a window."""
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None)
    return config.model_type in WRITTEN_OUT and window is None


def falls_back(model):
    """Whether OwnLayers samples from this model; sampling/probe.py may have found that it must."""
    return getattr(model, "falls_back", False) or not is_written_out(model.config)


class OwnLayers:
    """Decoder, used in the same way."""

    @torch.no_grad()
    def __init__(self, model, group_size, max_new_tokens, shares=True):
        own_attention(model)
        self.model, self.head = model, head_of(model)
        self.group_size, self.shares = group_size, shares
        self.device = model.get_input_embeddings().weight.device
        self.layers = [layer for layer in checkpointed(model) if layer.training]

    @torch.no_grad()
    def prefill(self, prompts, pictures=None):
        if any(pictures or ()):
            raise UserError(f"model type {self.model.config.model_type}: its own layers sample, "
                            "and no picture reaches them; take another model")  # fmt: skip
        ids, self.mask = left_padded(prompts, self.device)  # (Q, P)
        self.cache = DynamicCache(config=self.model.config)
        logits = self._read(ids, (self.mask.cumsum(-1) - 1).clamp(min=0))  # (Q, V)
        self.written = 0
        rows = 1 if self.shares else self.group_size  # of each question
        questions = np.arange(len(prompts)).repeat(rows)  # (R,)
        self.position = self.mask.sum(-1)  # (Q,)
        self._continue(questions)  # (R,) from here on
        row = np.arange(len(questions)).repeat(self.group_size // rows)  # (Q·G,)
        return logits.repeat_interleave(rows, dim=0), row

    @torch.no_grad()
    def step(self, tokens):
        self.mask = F.pad(self.mask, (0, 1), value=True)
        logits = self._read(tokens[:, None], self.position[:, None])
        self.position = self.position + 1
        self.written += 1
        return logits

    def length_to_read(self):
        """Of a completion, by the next step: what is written and the token at hand."""
        return self.written + 1

    @torch.no_grad()
    def branch(self, parents):
        """As Decoder's; the rows stand in the order of `parents`."""
        self._continue(parents)
        return np.arange(len(parents))

    def _continue(self, parents):
        """From now on, a row for each of `parents`, (R',) on the host, which it continues."""
        if not np.array_equal(parents, np.arange(len(self.position))):
            parents = to_device(torch.from_numpy(parents), self.device)
            self.cache.batch_select_indices(parents)
            self.mask, self.position = self.mask[parents], self.position[parents]

    def _read(self, ids, positions):
        """Run the model over ids (R, T), past keys and values before them. Logits (R, V)."""
        for layer in self.layers:  # in train mode, where they are checkpointed, they keep no cache
            layer.training = False
        hidden = self.model.get_decoder()(
            ids, attention_mask=self.mask, position_ids=positions, past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state[:, -1]  # (R, D)  # fmt: skip
        for layer in self.layers:
            layer.training = True
        return self.head.logits(hidden)
