"""The mathematics of GRPO: pure functions of tensors, each one an ablation point.

No function here knows a model, a batch object or a rank. Every denominator is an argument or is
already inside `weights_N`, so neither micro-batching nor the world size can change a gradient.

Shapes: P tasks, G samples a task, S trajectories, N tokens that the agent said (the only ones with
a loss). Three policies occur: *rollout* (the engine that sampled), *old* (the trainer before this
batch's updates) and the current one. Their log-probabilities differ even for the same weights,
because engine and trainer round differently.
"""

from __future__ import annotations

import torch
from torch import Tensor

AGGREGATIONS = ("token-mean", "sequence-mean", "dr-grpo")


def advantages(rewards_PG: Tensor, counted_PG: Tensor, *, divide_by_std: bool) -> Tensor:
    """(P, G) advantages: reward minus its group's mean, over the group's standard deviation if asked.

    `counted_PG` is False for episodes that say nothing about the agent; they are left out of the
    statistics and get 0. Shao et al. 2024 (GRPO), section 4.1, with the sample standard deviation; Liu et
    al. 2025 (Dr. GRPO) drop the division, which favours questions that are nearly always or
    nearly never solved. A group with one value throughout gets zeros.
    """
    assert rewards_PG.shape == counted_PG.shape and rewards_PG.ndim == 2
    count_P1 = counted_PG.sum(1, keepdim=True)
    mean_P1 = (rewards_PG * counted_PG).sum(1, keepdim=True) / count_P1.clamp(min=1)
    centred_PG = torch.where(counted_PG, rewards_PG - mean_P1, 0.0)
    low_P1 = rewards_PG.masked_fill(~counted_PG, torch.inf).amin(1, keepdim=True)
    high_P1 = rewards_PG.masked_fill(~counted_PG, -torch.inf).amax(1, keepdim=True)
    centred_PG = torch.where(low_P1 < high_P1, centred_PG, 0.0)  # exactly, whatever the mean was rounded to
    if not divide_by_std:
        return centred_PG
    std_P1 = (centred_PG.square().sum(1, keepdim=True) / (count_P1 - 1).clamp(min=1)).sqrt()
    return centred_PG / (std_P1 + 1e-6)


def asymmetric(advantages_PG: Tensor, negative_weight: float) -> Tensor:
    """(P, G) the same with those below zero times `negative_weight`.

    What an attempt says after its mistake has the mistake's advantage, and is noise. Arnal et al. 2025 make less of
    failures by a lower baseline; advantages that are divided by a standard deviation have no unit, so a factor does it.
    """
    return torch.where(advantages_PG < 0, negative_weight * advantages_PG, advantages_PG)


def token_weights(said_S: Tensor, aggregation: str, *, max_tokens: int) -> Tensor:
    """(S,) the weight of each token of trajectory s, so that the loss is the weighted *sum* over all.

    said_S: tokens said in each trajectory of the *global* batch.
    token-mean: every token counts the same (DAPO, Yu et al. 2025, eq. 8). sequence-mean: every
    trajectory counts the same (GRPO, Shao et al. 2024, eq. 3). dr-grpo: every token counts
    1 / (S * max_tokens), so that length changes nothing (Liu et al. 2025).
    """
    said_S = said_S.float()
    match aggregation:
        case "token-mean":
            return torch.ones_like(said_S) / said_S.sum().clamp(min=1)
        case "sequence-mean":
            return 1.0 / (len(said_S) * said_S.clamp(min=1))
        case "dr-grpo":
            return torch.ones_like(said_S) / (len(said_S) * max_tokens)
    raise ValueError(f"unknown aggregation {aggregation!r}; choose from {', '.join(AGGREGATIONS)}")


def truncated_importance(old_N: Tensor, rollout_N: Tensor, cap: float) -> Tensor:
    """(N,) min(pi_old / pi_rollout, cap): corrects for the engine's own rounding (Yao et al. 2025)."""
    return (old_N - rollout_N).exp().clamp(max=cap).detach()


def sequence_mask(old_N: Tensor, rollout_N: Tensor, sequence_N: Tensor, low: float, high: float) -> Tensor:
    """(N,) 1.0 for tokens of trajectories whose geometric-mean ratio old/rollout is in [low, high], else 0.0.

    sequence_N: which trajectory each token belongs to. A trajectory outside was, as a whole, not
    drawn from anything near the policy, and no per-token cap can mend that.
    """
    zeros = torch.zeros_like(old_N)  # one a trajectory; there are no more of them than tokens
    drift = zeros.index_add(0, sequence_N, old_N - rollout_N)
    count = zeros.index_add(0, sequence_N, torch.ones_like(old_N))
    ratio = (drift / count.clamp(min=1)).exp()
    return ((ratio >= low) & (ratio <= high)).to(old_N.dtype)[sequence_N]


def policy_loss(
    logprobs_N: Tensor, old_N: Tensor, advantages_N: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """(N,) loss -min(r A, clip(r) A) with r = pi / pi_old, and (N,) where the clip took the gradient.

    Schulman et al. 2017 (PPO), eq. 7, with DAPO's separate bounds [1 - clip_low, 1 + clip_high].
    """
    ratio_N = (logprobs_N - old_N).exp()
    plain_N = ratio_N * advantages_N
    clipped_N = ratio_N.clamp(1 - clip_low, 1 + clip_high) * advantages_N
    return -torch.minimum(plain_N, clipped_N), (clipped_N < plain_N).detach()


def k3(logprobs_N: Tensor, reference_N: Tensor) -> Tensor:
    """(N,) unbiased, non-negative estimate of KL(pi || reference) on samples of pi.

    exp(d) - d - 1 with d = log reference - log pi (Schulman 2020, "Approximating KL divergence"). As a term of the
    loss, as GRPO has it (Shao et al. 2024, eq. 4), its gradient on samples of pi is in the mean that of
    KL(reference || pi): both are least where the two agree, but it pulls otherwise on its way there.
    """
    delta_N = reference_N - logprobs_N
    return delta_N.exp() - delta_N - 1
