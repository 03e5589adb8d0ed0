"""RLOO: REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024, arXiv:2402.14740, section 3.3).

    A = score − mean of the other scores = (score − mean of all) · n / (n − 1)

for every step of the episode, over the group's n episodes; the score itself in a group of one.
"""

from __future__ import annotations

import numpy as np

from learner.advantages.rows import Advantages, StepRows, counting_rows, episode_scores, moments
from services.config.tree import AdvantageConfig


def rloo(rows: StepRows, config: AdvantageConfig) -> Advantages:
    """Advantages of every row."""
    scores = episode_scores(rows, config.invalid_action_penalty)
    mean, _, count = moments(scores, rows.group, counting_rows(rows, config))
    episode = np.where(count > 1, (scores - mean) * count / np.maximum(count - 1, 1), scores)
    return Advantages(episode=episode, step=np.zeros(len(rows)), total=episode)
