"""The mathematics of GRPO: advantages, KL, the clipped objective. Pure torch: no model, no file.

Letters: Q questions per step, G completions per question (the group), C completion tokens.

Sources: GRPO is DeepSeekMath (arXiv 2402.03300), eq. 3 (objective) and eq. 4 (KL); the clip is
PPO (1707.06347), eq. 7; separate bounds and the token mean are DAPO (2503.14476), eq. 8; the
constant length and the unscaled advantage are Dr. GRPO (2503.20783), section 3. Whatever else there
is to choose from names its source where it stands.
"""

import math
from dataclasses import dataclass, fields

import torch

STD_EPSILON = 1e-4  # keeps a group whose rewards hardly differ from huge advantages
# Rewards of a group that differ by less than this, relative to the largest, are equal: 0.8 + 0.1 is
# 0.9. In fp64 rounding is below 1e-15, so that 1e-6 is a difference up to rewards of a thousand.
ROUNDING = 1e-9
LINEAR_ABOVE = 10.0  # nats; below it, all that a healthy run has, k3 is exact
SAPO_TEMPERATURE, SAPO_TEMPERATURE_BELOW = 1.0, 1.05  # of good and of bad tokens (2511.20347)


def group_advantages(rewards, scale="std", chosen=None, baseline="mean"):
    """How much better each completion did than the others that answered the same question.

    rewards: (Q, G). Returns (Q, G): r - mean(group), divided by what `scale` names:

    * "std": the group's unbiased standard deviation (DeepSeekMath section 4.1.2);
    * "batch_std": that of all the step's rewards, so that no group is blown up for being nearly
      always or nearly never solved (Liu et al. 2508.08221: group mean, batch deviation);
    * "max_rl": the group's mean reward. For rewards of 0 and 1 the gradient is that of the log
      likelihood of a right answer, truncated at order G, so that hard questions weigh most (MaxRL,
      2602.02710). Of |r|, which is the same from 0 up, and below keeps the sign and A within G + 1;
    * "none": nothing (Dr. GRPO).

    A group without signal, see has_signal, gets exactly 0: rounding would be blown up by the
    division.

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
    elif scale == "batch_std":
        advantages = advantages / (_step_deviation(rewards, chosen) + STD_EPSILON)
    elif scale == "max_rl":
        advantages = advantages / (rewards.abs().where(chosen, 0).sum(-1, keepdim=True) / count)
    if baseline == "leave_one_out":
        advantages = advantages * count / (count - 1).clamp(min=1)
    return advantages.where(has_signal(rewards, chosen)[:, None], 0.0)


def decoupled_advantages(per_function, weights, chosen=None):
    """Advantages of every reward function by itself, each on its own scale, then their sum.

    per_function: (Q, G, F), weights: (F,). Returns (Q, G): sum_f w_f A_f, A_f being what
    group_advantages makes of function f alone, over the deviation that these sums have in the step
    (GDPO, 2601.05242; the mean that it subtracts is 0 in every group). A function then counts by
    its weight, however small or rare its differences are, and (0, 1) is not (1, 0) for having the
    same total.
    """
    if chosen is None:
        chosen = torch.ones_like(per_function[..., 0], dtype=torch.bool)
    each = [group_advantages(one, "std", chosen) for one in per_function.unbind(-1)]
    total = (torch.stack(each, -1) * weights).sum(-1)  # (Q, G)
    return total / (_step_deviation(total, chosen) + STD_EPSILON)


def _step_deviation(values, chosen):
    """The unbiased standard deviation of a step's chosen values, both (Q, G); 0 of fewer than 2."""
    count = chosen.sum()
    gaps = (values - values.where(chosen, 0).sum() / count.clamp(min=1)).where(chosen, 0)
    return (gaps.square().sum() / (count - 1).clamp(min=1)).sqrt()


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


def most_uncertain(entropy, share):
    """The least entropy of the `share` of tokens that have most, as a tensor (2506.01939: the
    forks in a chain of thought). entropy: (N,), N above 0, of *all* the step's tokens, or the
    choice would depend on how it is cut."""
    return entropy.topk(math.ceil(share * len(entropy))).values[-1]


def entropy_weight(bonus, entropy, target):
    """The weight of the entropy bonus in a step whose policy has this entropy: `bonus` at entropy
    0, falling in a straight line to 0 at `target`, from where on it is left alone. Skywork-OR1
    (2505.22312) adds to and takes from a weight that it keeps; this one remembers nothing, so that
    a resumed run goes on as it was. target 0: `bonus` always."""
    return bonus * max(0.0, 1 - entropy / target) if target else bonus


def completion_lengths(completion_mask):
    """How many tokens each completion has, up to the last one that the policy drew: (..., C) ->
    (...). What it was told in between, where it has several turns, counts."""
    places = torch.arange(1, completion_mask.shape[-1] + 1, device=completion_mask.device)  # (C,)
    return (completion_mask * places).amax(-1)


@dataclass(frozen=True)
class Objective:
    """What the loss is made of: the flags of the same names, whose help says what each does."""

    clip_epsilon: float = 0.2
    clip_epsilon_high: float = 0.2
    kl_beta: float = 0.0
    kl_estimator: str = "k3"
    ratio: str = "token"
    clip: str = "ppo"
    clip_delta: float = 0.0
    tis_cap: float = 0.0
    tis_floor: float = 0.0
    tis_form: str = "token_truncate"
    entropy_bonus: float = 0.0


@dataclass(frozen=True)
class Batch:
    """What the loss knows of R completions besides their log-probs now."""

    sampled_logprobs: torch.Tensor  # (R, C), those of the sampler when it drew them
    advantages: torch.Tensor  # (R,)
    weights: torch.Tensor  # (R, C), see token_weights
    ref_logprobs: torch.Tensor | None = None  # (R, C); None where no reference is kept
    old_logprobs: torch.Tensor | None = None  # (R, C), the trainer's before the step's first update
    acting: torch.Tensor | None = None  # (R, C) bool, tokens whose S_t counts; None: all

    def rows(self, index):
        """The Batch of these completions alone. index: (R',)."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{name: None if x is None else x[index] for name, x in tensors.items()})


def surrogate(log_ratio, logprobs, advantages, padding, objective):
    """(S_t, which of them a bound holds): what `clip` makes of the ratio r_t, exp of log_ratio, and
    its bounded self, b_t = clip(r_t, 1 - low, 1 + high).

    * "ppo": min(r_t A, b_t A), no gradient where a token went far enough (PPO, eq. 7). With
      clip_delta = d > 0, r_t is at most d, which bounds what a bad token costs that has become
      likely (dual clip: Ye et al. 1912.09729; two-sided: INTELLECT-2, 2505.07291);
    * "cispo": stop_gradient(b_t) A log pi_t, a gradient for every token (MiniMax-M1, eq. 4 and 5);
    * "sapo": sigmoid(tau (r_t - 1)) 4 / tau A, a gate that closes softly on both sides, a little
      faster where A is not positive (SAPO, 2511.20347); its gradient at ratio 1 is the others';
    * "gmpo": s A, one s for a completion, the geometric mean of its ratios after each has been
      clipped: s = exp(mean_t l_t), l_t = min(log r_t, clip(log r_t, -low, high)), for A < 0 the
      max; the bounds are those of log r_t (GMPO, 2507.20673).

    log_ratio: (R, C), of a sequence (R, 1), 0 at padding. logprobs, padding: (R, C). advantages:
    (R, 1). Returns (R, C), or (R, 1) where a completion has one value.
    """
    low, high = objective.clip_epsilon, objective.clip_epsilon_high
    if objective.clip == "gmpo":
        bounded = log_ratio.clamp(-low, high)
        one_sided = torch.where(
            advantages < 0, torch.maximum(log_ratio, bounded), torch.minimum(log_ratio, bounded)
        )  # (R, C)
        return sequence_mean(one_sided, padding).exp() * advantages, one_sided != log_ratio
    ratios = log_ratio.exp()  # (R, C), of a sequence (R, 1)
    if objective.clip == "sapo":
        tau = torch.full_like(advantages, SAPO_TEMPERATURE_BELOW)
        tau = tau.masked_fill(advantages > 0, SAPO_TEMPERATURE)  # (R, 1)
        return (tau * (ratios - 1)).sigmoid() * 4 / tau * advantages, torch.zeros_like(padding)
    bounded = ratios.clamp(1 - low, 1 + high)
    if objective.clip == "cispo":
        return bounded.detach() * advantages * logprobs, bounded != ratios  # (R, C)
    held = ratios.clamp(max=objective.clip_delta) if objective.clip_delta else ratios
    gain = torch.minimum(held * advantages, bounded * advantages)
    return gain, gain != ratios * advantages


def sequence_mean(values, padding):
    """The mean over each completion's tokens: values (R, C), 0 at padding, to (R, 1)."""
    return values.sum(-1, keepdim=True) / (~padding).sum(-1, keepdim=True).clamp(min=1)


def sampler_correction(log_gap, objective):
    """(c_t, which of them a bound holds): old_t / sampled_t, exp of log_gap, where it lies between
    tis_floor and tis_cap.

    tis_form says whose ratio it is, that of a "token", or the product over a completion, the
    "sequence" (Liu et al. 2025, "When Speed Kills Stability"), and what becomes of one outside: it
    is held at the bound, "truncate" (Yao et al. 2025, fengyao.notion.site/off-policy-rl), or 0,
    "mask" (IcePop, Ring-1T, 2510.18855, for tokens; masked importance sampling for sequences).
    What is masked still counts in the weights, as in an advantage of 0.

    log_gap: (R, C), 0 at padding. Returns (R, C), of a sequence (R, 1).
    """
    level, _, bound = objective.tis_form.partition("_")
    if level == "sequence":
        log_gap = log_gap.sum(-1, keepdim=True)
    gap = log_gap.exp()
    outside = (gap > objective.tis_cap) | (gap < objective.tis_floor)
    if bound == "mask":
        return gap.masked_fill(outside, 0.0), outside
    return gap.clamp(objective.tis_floor, objective.tis_cap), outside


def grpo_loss(logprobs, batch, objective, entropy=None):
    """This micro-batch's share of the loss, to be minimised (DeepSeekMath, eq. 3, by default).

        J = sum_t w_t [ c_t S_t - beta KL_t + entropy_bonus H_t ],   loss = -J

    S_t is the surrogate, a function of the ratio r_t: pi_t / old_t where `ratio` is "token"; where
    it is "sequence", all tokens of a completion have their geometric mean, and are clipped together
    (GSPO, eq. 5, with weights "grpo"). It counts where batch.acting says so, or everywhere.

    old_t is the trainer's own, computed as pi_t is: at the step's first update, where batch has no
    old_logprobs yet, every ratio is 1. The sampler computes in another order and, on a GPU, in
    bf16; that noise, 0.015 nats per token on an H100, is wider than GSPO's bounds and would clip
    half of the gradient. What sampled enters through c_t alone, a constant: 1, or with tis_cap > 0
    what sampler_correction says.

    logprobs: (R, C). batch: a Batch. objective: an Objective. entropy: (R, C), H_t in nats over the
    vocabulary, where entropy_bonus > 0.

    Returns (loss, sums): the loss keeps its gradient; `sums` holds detached token *sums* over this
    micro-batch, which the caller divides by the step's number of tokens: `clip_fraction` (tokens
    whose gradient, or with "cispo" whose ratio, the clip bounded), `mismatch` (|old_logprobs -
    sampled_logprobs|), `tis_capped` (tokens whose c_t a bound holds) and `kl`.
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
        log_ratio = sequence_mean(log_ratio, padding)  # (R, 1)
    gain, clipped = surrogate(log_ratio, logprobs, advantages, padding, objective)
    log_gap = old_logprobs - sampled_logprobs  # (R, C)
    sums = {"clip_fraction": (clipped & ~padding).sum(), "mismatch": log_gap.abs().sum()}
    if objective.tis_cap > 0:
        correction, outside = sampler_correction(log_gap, objective)
        gain = correction * gain
        sums["tis_capped"] = (outside & ~padding).sum()
    if batch.acting is not None:
        gain = gain.where(batch.acting, 0.0)  # (R, C)
    if batch.ref_logprobs is not None:
        ref_logprobs = batch.ref_logprobs.masked_fill(padding, 0.0)
        kl = kl_estimate(logprobs, ref_logprobs, objective.kl_estimator)
        gain = gain - objective.kl_beta * kl
        sums["kl"] = kl.sum()
    if objective.entropy_bonus > 0:
        gain = gain + objective.entropy_bonus * entropy.masked_fill(padding, 0.0)
    return -(weights * gain).sum(), {name: value.detach() for name, value in sums.items()}
