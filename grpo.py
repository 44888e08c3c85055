"""The mathematics of GRPO: advantages, KL, the clipped objective. Pure torch: no model, no file.

Letters: Q questions per step, G completions per question (the group), C completion tokens.

Sources: GRPO is DeepSeekMath (arXiv 2402.03300), eq. 3 (objective) and eq. 4 (KL); the clip is
PPO (1707.06347), eq. 7; separate bounds and the token mean are DAPO (2503.14476), eq. 8; the
constant length and the unscaled advantage are Dr. GRPO (2503.20783), section 3; the other
baseline, ratio and clip are RLOO (2402.14740), GSPO (2507.18071) and CISPO (2506.13585).
"""

from dataclasses import dataclass, fields

import torch

STD_EPSILON = 1e-4  # keeps a group whose rewards hardly differ from huge advantages
# Rewards of a group that differ by less than this, relative to the largest, are equal: 0.8 + 0.1 is
# 0.9. In fp64 rounding is below 1e-15, so that 1e-6 is a difference up to rewards of a thousand.
ROUNDING = 1e-9
LINEAR_ABOVE = 10.0  # nats; below it, all that a healthy run has, k3 is exact


def group_advantages(rewards, scale="std", chosen=None, baseline="mean"):
    """How much better each completion did than the others that answered the same question.

    rewards: (Q, G). Returns (Q, G): r - mean(group), divided by the group's unbiased standard
    deviation where `scale` is "std" (DeepSeekMath section 4.1.2), left as it is where it is "none"
    (Dr. GRPO, which argues that the division favours questions that are nearly always or nearly
    never solved). A group without signal, see has_signal, gets exactly 0: rounding would be blown
    up by the division.

    baseline: what is subtracted, the group's "mean", or that of its other completions,
    "leave_one_out", which does not contain r itself and so leaves the gradient unbiased (RLOO,
    section 3). It is the same times G / (G - 1): what changes is its weight against KL and entropy.

    chosen: (Q, G), the completions to train on, all by default. Mean and deviation are those of the
    chosen ones (PODS, Algorithm 1); the others get 0.
    """
    chosen = torch.ones_like(rewards, dtype=torch.bool) if chosen is None else chosen
    count = chosen.sum(-1, keepdim=True).clamp(min=1)  # (Q, 1)
    mean = rewards.where(chosen, 0).sum(-1, keepdim=True) / count
    advantages = (rewards - mean).where(chosen, 0)  # (Q, G)
    if scale == "std":
        variance = advantages.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)
        advantages = advantages / (variance.sqrt() + STD_EPSILON)
    if baseline == "leave_one_out":
        advantages = advantages * count / (count - 1).clamp(min=1)
    return advantages.where(has_signal(rewards, chosen)[:, None], 0.0)


def max_variance_subset(rewards, size):
    """The `size` completions of each group whose rewards vary most: (Q, G) -> bool (Q, G).

    They are the highest k and the lowest size - k for some k (PODS, arXiv 2504.13818, section 3):
    every k is tried. On a tie the more even split wins, then the one with more high rewards.
    """
    group_size = rewards.shape[-1]
    order = rewards.sort(dim=-1, stable=True).indices  # lowest first
    ranks = torch.arange(group_size, device=rewards.device)
    highs = sorted(range(size + 1), key=lambda k: (abs(2 * k - size), -k))
    # (size + 1, G): which ranks each k keeps
    kept = torch.stack([(ranks < size - k) | (ranks >= group_size - k) for k in highs])
    ordered = rewards.gather(-1, order).double()
    candidates = ordered[:, kept.nonzero()[:, 1].view(len(highs), size)]  # (Q, size + 1, size)
    variance = candidates.var(-1, correction=0)  # (Q, size + 1)
    # The first of equals; rounding makes equal ones differ.
    best = (variance >= variance.amax(-1, keepdim=True) * (1 - 1e-12)).int().argmax(-1)
    return torch.zeros_like(rewards, dtype=torch.bool).scatter(-1, order, kept[best])


def has_signal(rewards, chosen=None):
    """Which groups have unequal rewards, without which there is no advantage: (Q, G) -> (Q,).

    Rewards that rounding alone may tell apart are equal, see ROUNDING. chosen: (Q, G), the
    completions that count, all by default.
    """
    chosen = torch.ones_like(rewards, dtype=torch.bool) if chosen is None else chosen
    highest = rewards.where(chosen, -torch.inf).amax(-1)
    lowest = rewards.where(chosen, torch.inf).amin(-1)
    return highest - lowest > ROUNDING * torch.maximum(highest.abs(), lowest.abs())


def overlong_penalty(lengths, max_completion_length, buffer):
    """A reward for being short enough, in [-1, 0] (DAPO, eq. 13: soft overlong punishment).

    lengths: completions' tokens, of any shape. 0 up to max_completion_length - buffer, then falling
    in a straight line, to -1 at max_completion_length, where a completion is cut off.
    """
    return ((max_completion_length - buffer - lengths.double()) / buffer).clamp(-1, 0)


def kl_estimate(logprobs, ref_logprobs, estimator="k3"):
    """Per-token estimate of KL(policy || reference) from tokens that the policy sampled.

    Shapes are free but equal. Estimators as in Schulman, joschu.net/blog/kl-approx.html:
    k1 = log p/q, k2 = (log p/q)^2 / 2, k3 = q/p - 1 - log q/p (DeepSeekMath, eq. 4).

    As *values*, k1 and k3 are unbiased and k3 is never negative. As a *loss*, what counts is the
    expected gradient, and on-policy only k2's is that of the reverse KL; k3's is that of the
    forward KL, KL(reference || policy); k1's is zero. k3 is what the paper uses. Where q/p is above
    e^LINEAR_ABOVE, its q/p goes on in a straight line: a token that the policy has all but
    forgotten would otherwise overflow, and its whole step be skipped.
    """
    log_ratio = ref_logprobs - logprobs  # log q/p
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    bounded = log_ratio.clamp(max=LINEAR_ABOVE)
    ratio = bounded.exp() * (1 + (log_ratio - bounded))
    return ratio - 1 - log_ratio


def token_weights(completion_mask, aggregation="grpo", max_completion_length=None, sequences=None):
    """The weight of every token in the loss of the *whole* step; they are all that averages it.

    completion_mask: (Q, G, C), True for the tokens to train on. sequences: how many completions the
    loss is a mean over, Q G by default. Returns float weights (Q, G, C):

    * "grpo": 1 / (sequences |o_i|), mean over each, then over sequences (DeepSeekMath, eq. 3);
    * "dapo": 1 / (number of tokens in the step), mean over tokens (DAPO, eq. 8);
    * "dr_grpo": 1 / (sequences max_completion_length), a constant length (Dr. GRPO, section 3.1).

    The loss is a plain sum over weighted tokens, so however a step is cut into micro-batches, the
    parts add up to the same loss and the same gradient. Where no token is left, all weights are 0.
    """
    mask = completion_mask.float()
    if sequences is None:
        sequences = completion_mask.shape[0] * completion_mask.shape[1]
    if aggregation == "grpo":
        return mask / (sequences * mask.sum(-1, keepdim=True).clamp(min=1))
    if aggregation == "dapo":
        return mask / mask.sum().clamp(min=1)
    return mask / (sequences * max_completion_length)


@dataclass(frozen=True)
class Objective:
    """What the loss is made of: the flags of the same names, whose help says what each does."""

    clip_epsilon: float = 0.2
    clip_epsilon_high: float = 0.2
    kl_beta: float = 0.0
    kl_estimator: str = "k3"
    ratio: str = "token"
    clip: str = "ppo"
    tis_cap: float = 0.0
    entropy_bonus: float = 0.0


@dataclass(frozen=True)
class Batch:
    """What the loss knows of R completions besides their log-probs now."""

    sampled_logprobs: torch.Tensor  # (R, C), those of the sampler when it drew them
    advantages: torch.Tensor  # (R,)
    weights: torch.Tensor  # (R, C), see token_weights
    ref_logprobs: torch.Tensor | None = None  # (R, C); None where no reference is kept
    old_logprobs: torch.Tensor | None = None  # (R, C), the trainer's before the step's first update

    def rows(self, index):
        """The Batch of these completions alone. index: (R',)."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{name: None if x is None else x[index] for name, x in tensors.items()})


def grpo_loss(logprobs, batch, objective, entropy=None):
    """This micro-batch's share of the loss, to be minimised (DeepSeekMath, eq. 3, by default).

        J = sum_t w_t [ c_t S_t - beta KL_t + entropy_bonus H_t ],   loss = -J

    S_t is what `clip` makes of the ratio r_t and its bounded self, b_t = clip(r_t, 1-low, 1+high):

    * "ppo": min(r_t A, b_t A), no gradient where a token went far enough (PPO, eq. 7);
    * "cispo": stop_gradient(b_t) A log pi_t, a gradient for every token (MiniMax-M1, eq. 4 and 5).

    r_t is pi_t / old_t where `ratio` is "token"; where it is "sequence", all tokens of a completion
    have their geometric mean, and are clipped together (GSPO, eq. 5, with weights "grpo").

    old_t is the trainer's own, computed as pi_t is: at the step's first update, where batch has no
    old_logprobs yet, every ratio is 1. The sampler computes in another order and, on a GPU, in
    bf16; that noise, 0.015 nats per token on an H100, is wider than GSPO's bounds and would clip
    half of the gradient. What sampled enters through c_t alone, a constant: 1, or with tis_cap > 0
    min(old_t / sampled_t, tis_cap) (truncated importance sampling: Yao et al. 2025,
    fengyao.notion.site/off-policy-rl).

    logprobs: (R, C). batch: a Batch. objective: an Objective. entropy: (R, C), H_t in nats over the
    vocabulary, where entropy_bonus > 0.

    Returns (loss, sums): the loss keeps its gradient; `sums` holds detached token *sums* over this
    micro-batch, which the caller divides by the step's number of tokens: `clip_fraction` (tokens
    whose gradient, or with "cispo" whose ratio, the clip bounded), `mismatch` (|old_logprobs -
    sampled_logprobs|), `tis_capped` (tokens whose c_t the cap holds) and `kl`.
    """
    weights, advantages = batch.weights, batch.advantages.unsqueeze(-1)  # (R, C), (R, 1)
    # Or whatever else is not trained on here. Weight 0 alone would not do: what stands there may be
    # infinite, and 0 x inf is NaN.
    padding = weights == 0
    old_logprobs = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
    logprobs, old_logprobs, sampled_logprobs = (
        x.masked_fill(padding, 0.0) for x in (logprobs, old_logprobs, batch.sampled_logprobs)
    )
    log_ratio = logprobs - old_logprobs  # (R, C)
    if objective.ratio == "sequence":
        log_ratio = log_ratio.sum(-1, keepdim=True) / (~padding).sum(-1, keepdim=True).clamp(min=1)
    ratios = log_ratio.exp()  # (R, C), of a sequence (R, 1)
    bounded = ratios.clamp(1 - objective.clip_epsilon, 1 + objective.clip_epsilon_high)
    if objective.clip == "ppo":
        gain = torch.minimum(ratios * advantages, bounded * advantages)
        clipped = bounded * advantages < ratios * advantages
    else:
        gain = bounded.detach() * advantages * logprobs  # (R, C)
        clipped = bounded != ratios
    sums = {
        "clip_fraction": (clipped & ~padding).sum(),
        "mismatch": (old_logprobs - sampled_logprobs).abs().sum(),
    }
    if objective.tis_cap > 0:
        correction = (old_logprobs - sampled_logprobs).exp()  # (R, C)
        gain = correction.clamp(max=objective.tis_cap) * gain
        sums["tis_capped"] = ((correction > objective.tis_cap) & ~padding).sum()
    if batch.ref_logprobs is not None:
        ref_logprobs = batch.ref_logprobs.masked_fill(padding, 0.0)
        kl = kl_estimate(logprobs, ref_logprobs, objective.kl_estimator)
        gain = gain - objective.kl_beta * kl
        sums["kl"] = kl.sum()
    if objective.entropy_bonus > 0:
        gain = gain + objective.entropy_bonus * entropy.masked_fill(padding, 0.0)
    return -(weights * gain).sum(), {name: value.detach() for name, value in sums.items()}
