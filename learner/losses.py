"""The policy loss of an update, over a flat list of response tokens.

    ratio = π(a) / π_old(a)
    L     = − w · min(ratio · A, clip(ratio, 1 − clip_low, 1 + clip_high) · A)     PPO, w = min(π_old/μ, cap)
            + kl_coef · (e^d − d − 1),  d = log π_ref(a) − log π(a)                k3 estimate of KL(π ‖ π_ref)
            − entropy_coef · H(π)

summed over tokens and divided by one token count for the whole optimizer step, whatever the ranks, the micro-batches
or the packing. μ is the sampler's policy. For negative A, dual clip bounds the objective below by dual_clip · A.

Invariants
- Nothing here knows rows or padding: tokens that must not count are not in the list, or have weight 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from services.config.tree import LossConfig

MAX_LOG_RATIO = 20.0
"""Log-ratios are cut here: e^20 is far outside of every clip, and float32 overflows at e^88."""


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """What the loss reads of T response tokens; float32 [T] each.

    Attributes:
        logprob: log π of the sampled token, with gradient.
        behaviour: log μ, as the sampler reported it.
        advantage: of the token's step.
        weight: 1, or 0 for tokens that only fill a batch.
        old: log π_old; None: π_old = μ.
        reference: log π_ref; only read when kl_coef > 0.
        entropy: H(π) at the token's position, with gradient when entropy_coef > 0.
    """

    logprob: Tensor
    behaviour: Tensor
    advantage: Tensor
    weight: Tensor
    old: Tensor | None = None
    reference: Tensor | None = None
    entropy: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LossTerms:
    """The loss of one micro-batch, and weighted token sums of its metrics.

    Divide each sum by `sums["tokens"]` after adding up micro-batches and ranks.
    """

    loss: Tensor
    sums: dict[str, Tensor] = field(default_factory=dict)


def policy_loss(batch: TokenBatch, config: LossConfig, total_tokens: int) -> LossTerms:
    """Sum of the token losses over `total_tokens`, the number of response tokens of the whole optimizer step."""
    old = batch.behaviour if batch.old is None else batch.old
    ratio = _ratio(batch.logprob, old)
    objective, clipped = _clipped_objective(ratio, batch.advantage, config)
    if batch.old is not None and config.importance_cap is not None:
        objective = objective * _ratio(batch.old, batch.behaviour).clamp(max=config.importance_cap)
    token_loss = -objective
    sums = {
        "tokens": batch.weight.sum(),
        "ratio": (batch.weight * ratio).sum(),
        "clip_fraction": (batch.weight * clipped).sum(),
        "logprob_gap": (batch.weight * (batch.logprob - batch.behaviour).abs()).sum(),
    }
    if config.kl_coef > 0:
        if batch.reference is None:
            raise ValueError("loss.kl_coef > 0 needs the reference policy's log-probabilities")
        kl = k3(batch.logprob, batch.reference)
        token_loss = token_loss + config.kl_coef * kl
        sums["kl"] = (batch.weight * kl).sum()
    if batch.entropy is not None:
        token_loss = token_loss - config.entropy_coef * batch.entropy
        sums["entropy"] = (batch.weight * batch.entropy).sum()
    loss = (batch.weight * token_loss).sum() / total_tokens
    return LossTerms(loss=loss, sums={name: value.detach() for name, value in sums.items()})


def k3(logprob: Tensor, reference: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(π ‖ π_ref) at each sampled token; never negative."""
    gap = (reference - logprob).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return gap.exp() - gap - 1.0


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return (numerator - denominator).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _clipped_objective(ratio: Tensor, advantage: Tensor, config: LossConfig) -> tuple[Tensor, Tensor]:
    """PPO's objective of each token, and whether the clip binds (1 or 0)."""
    free = ratio * advantage
    bounded = ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high) * advantage
    objective = torch.minimum(free, bounded)
    clipped = (bounded < free).to(ratio.dtype)
    if config.dual_clip is not None:
        floor = config.dual_clip * advantage
        objective = torch.where(advantage < 0, torch.maximum(objective, floor), objective)
    return objective, clipped
