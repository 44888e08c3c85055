"""What prompts show: pictures as features, in the places of their prompt's placeholders.

A `Picture` travels beside a prompt's ids, through sampling and training alike. The tower that made
it is frozen, so that its features are computed once per question and are data from then on. A
placeholder that the policy samples is an ordinary token: a Picture says where it is seen.

Letters: Q prompts, P tokens of one, I places that show something, D hidden size.
"""

from dataclasses import dataclass

import numpy as np
import torch

from utils import to_device


@dataclass(frozen=True)
class Picture:
    """All that one prompt shows, be it one picture or several."""

    features: torch.Tensor  # (I, D)
    places: np.ndarray  # (I,), of the placeholders among the prompt's tokens; on the host
    # (3, P), of all the prompt's tokens, for multimodal rotary embeddings (Qwen2-VL, arXiv
    # 2409.12191, section 2.1); on the host. None: they count up.
    positions: np.ndarray | None = None
    deep: tuple = ()  # (I, D) each, added after the first layers (Qwen3-VL's deepstack)


@dataclass(frozen=True)
class Shown:
    """The Pictures of all prompts that are read at once."""

    places: torch.Tensor  # (I,), among all tokens in a row
    features: torch.Tensor  # (I, D)
    deep: list  # (I, D) each

    def put_into(self, embeds):
        """Embeddings (B, T, D) with the features in their places."""
        flat = embeds.flatten(0, 1)
        return flat.index_copy(0, self.places, self.features.to(flat.dtype)).view_as(embeds)

    def deepen(self, hidden, layer):
        """Hidden states (B, T, D) after this layer, counted from 0, with what is added there."""
        if layer >= len(self.deep):
            return hidden
        deep = self.deep[layer].to(hidden.dtype)
        return hidden.flatten(0, 1).index_add(0, self.places, deep).view_as(hidden)


def shown(pictures, starts, device):
    """The Pictures (Q, None for a prompt that shows nothing) whose prompts' first tokens stand at
    `starts`, as one; None where there are none."""
    found = [(picture, start) for picture, start in zip(pictures or (), starts) if picture]
    if not found:
        return None
    places = np.concatenate([picture.places + start for picture, start in found])
    return Shown(
        places=to_device(torch.from_numpy(places), device),
        features=torch.cat([picture.features for picture, _ in found]),
        deep=[torch.cat(parts) for parts in zip(*(picture.deep for picture, _ in found))],
    )


def first_place(pictures):
    """How many tokens all prompts have before any of them shows something."""
    return min((picture.places[0] for picture in pictures or () if picture), default=np.inf)


def prompt_positions(pictures, lengths):
    """The positions of Q prompts' tokens, a list of (3, P); None where all count up."""
    if not any(picture and picture.positions is not None for picture in pictures or ()):
        return None
    counted = (np.broadcast_to(np.arange(length), (3, length)) for length in lengths)
    return [
        plain if picture is None or picture.positions is None else picture.positions
        for picture, plain in zip(pictures, counted)
    ]


def positions_after(pictures, lengths):
    """The position of the first token after each prompt, (Q,): of a picture's places many may have
    the same."""
    positions = prompt_positions(pictures, lengths)
    return np.array(lengths if positions is None else [p.max() + 1 for p in positions])
