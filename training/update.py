"""One optimizer update per inner epoch on a step's completions.

The loss is a weighted sum over tokens whose weights come from the whole step, so the passes that a
step is cut into simply add up (see grpo.token_weights).

Q questions per step, G completions per question, C completion tokens; B = Q x G completions of a
step, R of them in a pass.
"""

from dataclasses import dataclass, fields, replace
from statistics import fmean

import torch

from grpo import (
    Batch,
    Objective,
    completion_lengths,
    entropy_weight,
    grpo_loss,
    most_uncertain,
    token_weights,
)
from training.logprobs import completion_logprobs, logprobs_without_gradient
from training.optimizer import apply_gradients
from training.processes import everyones, sum_gradients, summed
from training.progress import progress
from training.resting import rest
from training.sharding import own_batches
from training.shared_prefix import MicroBatch, own_tokens


@dataclass(frozen=True)
class Pass:
    """A forward and backward pass: what the model reads, and what the loss knows of it."""

    read: MicroBatch
    ids: torch.Tensor  # (R, C)
    batch: Batch


def update_policy(setup, optimizer, rollouts, advantages, chosen=None):
    """Train on a step's Rollouts. Returns metrics.

    advantages: (Q, G), in fp64 or already in the log-probs' dtype, which the loss is computed in.
    chosen: (Q, G), the completions to train on, all by default. An update whose loss or gradient is
    not finite changes nothing.
    """
    policy, args, accelerator = setup.policy, setup.args, setup.accelerator
    chosen = torch.ones_like(advantages, dtype=torch.bool) if chosen is None else chosen
    chosen = chosen.to(policy.device)  # (Q, G)
    advantages = advantages.to(policy.device, rollouts.logprobs.dtype)  # (Q, G)
    passes, idle, trained_tokens = cut(setup, rollouts, advantages, chosen)
    run = passes + idle
    objective, epochs = objective_now(args, rollouts), []
    if args.top_entropy < 1:
        with setup.stopwatch("policy"):
            run = on_most_uncertain(setup, run)
    for _ in range(args.num_inner_epochs):
        with setup.stopwatch("policy"):
            metrics = {"loss": torch.zeros((), device=policy.device)}
            for i, one in enumerate(run):
                loss, sums, logprobs = forward_and_backward(setup, one, objective)
                if one.batch.old_logprobs is None:  # before the step's first update
                    run[i] = replace(one, batch=replace(one.batch, old_logprobs=logprobs))
                progress.tick(1, "passes", of=len(run))
                metrics["loss"] += loss
                for name, value in sums.items():
                    metrics[name] = metrics.get(name, 0) + value / trained_tokens
            metrics = summed(metrics, accelerator)
            sum_gradients(optimizer, accelerator)
            metrics["grad_norm"], metrics["skipped"] = apply_gradients(
                optimizer, metrics["loss"], args.max_grad_norm, setup.loss_scale
            )
        epochs.append({name: float(value) for name, value in metrics.items()})
    means = {name: fmean(epoch[name] for epoch in epochs) for name in epochs[0]}
    means.setdefault("mismatch", 0.0)  # where nothing was trained on
    counts = summed(trained_counts(passes, always_trained(setup)), accelerator)
    if args.entropy_target > 0:
        means["entropy_bonus"] = objective.entropy_bonus
    return means | {name: int(count) for name, count in counts.items()}


def forward_and_backward(setup, one, objective):
    """Add a Pass's gradient to that of the weights. Returns its share of the loss, what else
    grpo_loss sums, and the log-probs (R, C). Its graph ends here: it would lie in the midst of the
    memory that the next one needs."""
    args, with_entropy = setup.args, objective.entropy_bonus > 0
    with setup.accelerator.autocast():
        logprobs, entropy = completion_logprobs(
            setup.policy, one.read, one.ids, args.temperature, with_entropy
        )  # (R, C)
    loss, sums = grpo_loss(logprobs, one.batch, objective, entropy)
    (loss * setup.loss_scale.scale).backward()
    return loss.detach(), sums, logprobs.detach()


def objective_of(args):
    """The Objective that the flags name."""
    return Objective(**{field.name: getattr(args, field.name) for field in fields(Objective)})


def objective_now(args, rollouts):
    """The Objective of this step: with --entropy_target, the bonus depends on the entropy, here the
    mean of -log-prob over the sampled tokens, an estimate without bias that costs nothing. Of
    tokens that a filter chose (top_k, top_p, min_p) it is less, see run.step_metrics."""
    objective = objective_of(args)
    if args.entropy_target == 0:
        return objective
    entropy = (-rollouts.logprobs.sum() / rollouts.completion_mask.sum()).item()
    bonus = entropy_weight(args.entropy_bonus, entropy, args.entropy_target)
    return replace(objective, entropy_bonus=bonus)


@torch.no_grad()
def on_most_uncertain(setup, passes):
    """The Passes whose Batch says which tokens act: of all the step's tokens that have an advantage
    the --top_entropy of highest entropy.

    Which these are is known only once all entropies are, and those of the policy that learns, not
    the sampler's in bf16, are meant: so every pass goes forward once more, before the first.
    """
    args, entropies, counted = setup.args, [], []
    for one in passes:
        with setup.accelerator.autocast():
            _, entropy = completion_logprobs(
                setup.policy, one.read, one.ids, args.temperature, True
            )
        progress.tick(1, "passes", of=len(passes))
        entropies.append(entropy)  # (R, C)
        counted.append(entropy[(one.batch.weights != 0) & (one.batch.advantages != 0)[:, None]])
    own = torch.cat(counted).cpu() if counted else torch.zeros(0, device="cpu")
    of_step = torch.cat(everyones(own, setup.accelerator))  # (N,)
    if not len(of_step):
        return passes
    least = most_uncertain(of_step, args.top_entropy).to(setup.policy.device)
    return [
        replace(one, batch=replace(one.batch, acting=entropy >= least))
        for one, entropy in zip(passes, entropies)
    ]


def always_trained(setup):
    """Whether a token has a gradient without an advantage too: that of KL or entropy."""
    return setup.reference is not None or setup.args.entropy_bonus > 0


def flat_groups_train(setup):
    """Whether a group without an advantage has a part in the update: for the KL, unless the flags
    say that it is not worth a pass, and for an entropy bonus, which such groups need the most."""
    needed = setup.args.entropy_bonus > 0 or not setup.args.skip_flat_groups
    return needed and always_trained(setup)


def cut(setup, rollouts, advantages, chosen):
    """The step in passes: (this process's, idle ones, the number of tokens that all train on).

    A group whose completions all earned the same has no advantage. Where nothing else gives it a
    gradient, see flat_groups_train, it is left out, but still counts in what is averaged: the
    others weigh what they did. Idle passes have weight 0: where weights are cut up (FSDP2), all
    processes go through the model equally often.
    """
    args = setup.args
    mask = rollouts.completion_mask & chosen[:, :, None]  # (Q, G, C)
    if args.mask_truncated:
        mask = mask & rollouts.finished[:, :, None]
    sequences = chosen.sum().clamp(min=1)
    weights = token_weights(mask, args.aggregation, args.max_completion_length, sequences)
    if not flat_groups_train(setup):
        mask = mask & (advantages != 0).any(-1)[:, None, None]
    ids = rollouts.completion_ids.flatten(0, 1)  # (B, C)
    own, lengths, batches, idle = own_batches(
        setup, rollouts.prompt_ids, completion_lengths(mask).tolist(), ids, rollouts.pictures
    )
    # `own` groups are this process's; the others have weight 0 here.
    weights = weights * weights.new_tensor(own)[:, None, None]
    step = Batch(
        sampled_logprobs=rollouts.logprobs.flatten(0, 1),
        advantages=advantages.flatten(),
        weights=weights.flatten(0, 1),
        ref_logprobs=reference_logprobs(setup, rollouts, lengths, ids),
    )
    passes, idle = (
        [Pass(read, ids[read.rows], step.rows(read.rows)) for read in part]
        for part in (batches, idle)
    )
    return passes, idle, mask.sum().clamp(min=1)


def reference_logprobs(setup, rollouts, lengths, ids):
    """What the reference thinks of the Rollouts' completions, whose ids are (B, C), as (B, C); None
    where there is none."""
    if setup.reference is None:
        return None
    with setup.stopwatch("reference"), setup.accelerator.autocast():
        logprobs = logprobs_without_gradient(
            setup.reference, rollouts.prompt_ids, lengths, ids, setup.args, rollouts.pictures
        )  # (B, C)
    if not setup.args.update_ref_model:
        rest(setup.reference, setup.args.output_dir, setup.policy.parameters())
    return logprobs


def trained_counts(passes, always):
    """What an update trained on, as metrics.

    always: see always_trained. tokens/trained: those that carry gradient. tokens/padded: places in
    the passes' attention that hold no token, in prompts and in completions' own tokens.
    """
    trained, padded = [], 0
    for one in passes:
        prompts = [len(prompt) for prompt in one.read.prompts]
        for rows in (prompts, [own for own in own_tokens(one.read) if own]):
            padded += len(rows) * max(rows, default=0) - sum(rows)
        counts = (one.batch.weights != 0).sum(-1).tolist()  # of the policy's own tokens
        trained += [
            count
            for advantage, count in zip(one.batch.advantages.tolist(), counts)
            if always or advantage != 0
        ]
    return {
        "tokens/trained": sum(trained),
        "tokens/padded": padded,
        "completions/trained": len(trained),
    }
