"""GAE: generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438, eq. 16), over tokens or over turns.

    δ_t = r_t + γ·V_{t+1} − V_t
    A_t = δ_t + γλ·A_{t+1}
    return_t = A_t + V_t                what the critic is trained towards

A sequence is a response, or the response tokens of an episode one after the other, or its turns: what is between them,
such as an observation's tokens, is no element of it. After the last element V is 0, or `bootstrap` where a limit cut
the episode.

Example, γ 1, λ 0.5, one sequence, V 1 2 3, rewards 0 0 10:

    δ   1    1    7
    A   3.25 4.5  7        7; 1 + 0.5 · 7; 1 + 0.5 · 4.5
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from learner.advantages.rows import Floats, Ids, discounted_sums

WHITENING = 1e-8
"""Added to the variance by `whitened`."""


@dataclass(frozen=True, slots=True)
class Estimates:
    """float64 [N] each: the advantage of every element, and the return that the critic is trained towards."""

    advantage: Floats
    returns: Floats


def gae(
    values: Floats, rewards: Floats, lengths: Ids, gamma: float, lam: float, bootstrap: Floats | None = None
) -> Estimates:
    """Estimate the advantages of the elements of sequences.

    Args:
        values: float64 [N], the critic's V of each element; sequences one after the other.
        rewards: float64 [N], reward of each element.
        lengths: int64 [S], elements of each sequence, at least one.
        gamma: discount factor.
        lam: λ; 1: Monte Carlo returns, 0: one step.
        bootstrap: float64 [S], V after the last element of each sequence; None: 0.

    Raises:
        ValueError: the lengths do not add up to N, or one of them is less than 1.
    """
    if len(values) != len(rewards) or int(lengths.sum()) != len(values) or (lengths < 1).any():
        raise ValueError(f"lengths {lengths.tolist()[:5]} … do not divide {len(values)} values, {len(rewards)} rewards")
    ends = np.cumsum(lengths) - 1
    after = np.append(values[1:], 0.0)[: len(values)]
    after[ends] = 0.0 if bootstrap is None else bootstrap
    left = np.repeat(ends, lengths) - np.arange(len(values))
    advantage = discounted_sums(rewards + gamma * after - values, left, gamma * lam)
    return Estimates(advantage=advantage, returns=advantage + values)


def whitened(values: Floats) -> Floats:
    """Values with mean 0 and variance 1 (ddof 1, + 1e-8 under the root), as PPO's published code whitens a batch; [N].

    A lone value becomes 0.
    """
    variance = values.var(ddof=1) if len(values) > 1 else 0.0
    scaled: Floats = (values - values.mean()) / np.sqrt(variance + WHITENING) if len(values) else values
    return scaled
