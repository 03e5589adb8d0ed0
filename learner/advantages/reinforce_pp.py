"""REINFORCE++: advantages normalised over the whole batch (Hu et al. 2025, arXiv:2501.03262).

    A = (b − mean over the batch of b) / F

for every step of the episode, over the episodes of all groups together. b is the score (REINFORCE++), or with
`group_baseline` the score − mean of its group (REINFORCE++-baseline). F is the standard deviation (ddof 1, + 1e-6),
or 1. The paper's KL penalty in the reward, − β · Σ_{s ≥ t} k1_s of the response's tokens, is added in `learner.losses`.
"""

from __future__ import annotations

import numpy as np

from learner.advantages.rows import EPSILON, Advantages, StepRows, counting_rows, episode_scores, moments
from services.config.tree import AdvantageConfig


def reinforce_pp(rows: StepRows, config: AdvantageConfig) -> Advantages:
    """Advantages of every row."""
    counted = counting_rows(rows, config)
    scores = episode_scores(rows, config.invalid_action_penalty)
    if config.group_baseline:
        scores = scores - moments(scores, rows.group, counted)[0]
    mean, deviation, _ = moments(scores, np.zeros(len(rows), dtype=np.int64), counted)
    scale = deviation + EPSILON if config.normalisation == "std" else 1.0
    episode = (scores - mean) / scale
    return Advantages(episode=episode, step=np.zeros(len(rows)), total=episode)
