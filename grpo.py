"""The mathematics of GRPO: advantages, KL, the clipped objective. Pure torch: no model, no file.

Letters: Q questions per step, G completions per question (the group), C completion tokens.

Sources: GRPO is DeepSeekMath (arXiv 2402.03300), eq. 3 (objective) and eq. 4 (KL); the clip is
PPO (1707.06347), eq. 7; separate bounds and the token mean are DAPO (2503.14476), eq. 8; the
constant length and the unscaled advantage are Dr. GRPO (2503.20783), section 3.
"""

import torch

STD_EPSILON = 1e-4  # keeps a group whose rewards differ by rounding alone from a huge advantage


def group_advantages(rewards, scale="std", chosen=None):
    """How much better each completion did than the others that answered the same question.

    rewards: (Q, G). Returns (Q, G): r - mean(group), divided by the group's unbiased standard
    deviation where `scale` is "std" (DeepSeekMath section 4.1.2), left as it is where it is "none"
    (Dr. GRPO, which argues that the division favours questions that are nearly always or nearly
    never solved). A group whose rewards are all equal gets exactly 0: rounding in the mean would
    otherwise be blown up by the division.

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
    highest = rewards.where(chosen, -torch.inf).amax(-1, keepdim=True)
    lowest = rewards.where(chosen, torch.inf).amin(-1, keepdim=True)
    return advantages.masked_fill(highest <= lowest, 0.0)


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


def has_signal(rewards):
    """Which groups have unequal rewards, without which there is no advantage: (Q, G) -> (Q,)."""
    return rewards.amax(-1) > rewards.amin(-1)


def kl_estimate(logprobs, ref_logprobs, estimator="k3"):
    """Per-token estimate of KL(policy || reference) from tokens that the policy sampled.

    Shapes are free but equal. Estimators as in Schulman, joschu.net/blog/kl-approx.html:
    k1 = log p/q, k2 = (log p/q)^2 / 2, k3 = q/p - 1 - log q/p (DeepSeekMath, eq. 4).

    As *values*, k1 and k3 are unbiased and k3 is never negative. As a *loss*, what counts is the
    expected gradient, and on-policy only k2's is that of the reverse KL; k3's is that of the
    forward KL, KL(reference || policy); k1's is zero. k3 is what the paper uses.
    """
    log_ratio = ref_logprobs - logprobs  # log q/p
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    return log_ratio.exp() - 1 - log_ratio


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


def grpo_loss(
    logprobs,
    old_logprobs,
    ref_logprobs,
    advantages,
    weights,
    clip_epsilon_low=0.2,
    clip_epsilon_high=0.2,
    kl_beta=0.0,
    kl_estimator="k3",
):
    """This micro-batch's share of the GRPO loss (DeepSeekMath, eq. 3), to be minimised.

        J = sum_t w_t [ min(r_t A, clip(r_t, 1 - low, 1 + high) A) - beta KL_t ],   loss = -J

    with r_t = exp(logprobs - old_logprobs). logprobs, old_logprobs and weights have any shape
    (..., C), advantages the same without C; ref_logprobs is None where no reference is kept.

    Returns (loss, sums): the loss keeps its gradient; `sums` holds detached token *sums* over this
    micro-batch, which the caller divides by the step's number of tokens: `clip_fraction` (tokens
    whose gradient the clip removed), `mismatch` (|logprobs - old_logprobs|) and `kl`.
    """
    advantages = advantages.unsqueeze(-1)  # (..., 1)
    # Weight 0 alone would not do: what stands at padded places may be infinite, and 0 x inf is NaN.
    padding = weights == 0
    logprobs = logprobs.masked_fill(padding, 0.0)
    old_logprobs = old_logprobs.masked_fill(padding, 0.0)
    log_ratio = logprobs - old_logprobs  # (..., C)
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1 - clip_epsilon_low, 1 + clip_epsilon_high)
    objective = torch.minimum(ratio * advantages, clipped_ratio * advantages)  # (..., C)
    sums = {
        "clip_fraction": (clipped_ratio * advantages < ratio * advantages).sum(),
        "mismatch": log_ratio.abs().sum(),
    }
    if ref_logprobs is not None:
        kl = kl_estimate(logprobs, ref_logprobs.masked_fill(padding, 0.0), kl_estimator)
        objective = objective - kl_beta * kl
        sums["kl"] = kl.sum()
    return -(weights * objective).sum(), {name: value.detach() for name, value in sums.items()}
