"""What a model makes of its last hidden state: logits, which some families scale or bound.

    logits = cap · tanh(scale · W h / cap),    cap infinite where they are not bounded

Letters: N tokens, D hidden size, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from utils import UserError


@dataclass(frozen=True)
class Head:
    weight: torch.Tensor  # W, (V, D)
    scale: float = 1.0
    cap: float | None = None

    def logits(self, hidden):
        """hidden: (N, D). Returns (N, V), as training/logprobs.py has them: never in bf16."""
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.to(self.weight.dtype) * self.scale
            return capped_(F.linear(hidden, self.weight), self.cap)


def head_of(model):
    """The Head of a causal language model, from its output layer and its configuration.

    Granite divides logits by `logits_scaling`, Cohere multiplies them by `logit_scale`, Gemma
    bounds them by `final_logit_softcapping`. Whatever else a family does, sampling/probe.py finds.
    Raises UserError for a head with a bias.
    """
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise UserError(f"model type {config.model_type}: its head has a bias; not supported")
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    return Head(head.weight, scale, getattr(config, "final_logit_softcapping", None))


def capped_(logits, cap):
    """cap · tanh(logits / cap), in place; None leaves them as they are."""
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)
