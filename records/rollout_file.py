"""A step's rollouts as a file: what an objective needs to be computed again without sampling.

RUN/rollouts/step_00012.safetensors holds Q questions, G completions each, C tokens, F rewards:

prompt_ids (all prompts, one behind the other), prompt_lengths (Q,), completion_ids,
completion_mask and logprobs (Q, G, C), finished, total, advantages and chosen (Q, G), and
per_function (Q, G, F), whose names are in the metadata, with weights (F,), which older files lack.
Rewards and advantages are in fp64, in older files in fp32. The log-probs are those when sampled, at
the sampling temperature. Texts are in RUN/completions/.
"""

import json
import os

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from evaluation.scoring import Rewards
from sampling.rollouts import Rollouts
from utils import UserError

OF_ROLLOUTS = ("completion_ids", "completion_mask", "logprobs", "finished")


def save_rollouts(path, rollouts, rewards, advantages, chosen):
    """Write the file, never half. rewards: Rewards; advantages and chosen: (Q, G)."""
    tensors = {name: getattr(rollouts, name) for name in OF_ROLLOUTS}
    tensors |= {
        "prompt_ids": torch.cat(rollouts.prompt_ids),
        "prompt_lengths": torch.tensor([len(ids) for ids in rollouts.prompt_ids]),
        "per_function": rewards.per_function,
        "total": rewards.total,
        "weights": rewards.weights,
        "advantages": advantages,
        "chosen": chosen,
    }
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, partial, metadata={"rewards": json.dumps(rewards.names)})
    os.replace(partial, path)


def load_rollouts(path, device="cpu"):
    """(Rollouts without texts, Rewards, advantages (Q, G), chosen (Q, G)), the first on `device`.

    Raises UserError where the file is none of these.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            names = json.loads(file.metadata()["rewards"])
        prompts = tensors["prompt_ids"].to(device).split(tensors["prompt_lengths"].tolist())
        rollouts = Rollouts(
            prompt_ids=list(prompts),
            texts=None,
            **{name: tensors[name].to(device) for name in OF_ROLLOUTS},
        )
        rewards = Rewards(names, tensors["per_function"], tensors["total"], tensors.get("weights"))
        return rollouts, rewards, tensors["advantages"], tensors["chosen"]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        raise UserError(f"{path}: damaged, or not a file of rollouts") from None
