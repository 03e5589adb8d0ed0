"""RLOO: REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024, arXiv:2402.14740, section 3.3).

    A = score − mean of the other scores = (score − mean of all) · n / (n − 1)

for every step of the episode, over the group's n episodes; the score itself in a group of one.
"""

from __future__ import annotations

import numpy as np

from learner.advantages.description import SCORES, describe
from learner.advantages.episodes import counted_scores
from learner.advantages.rows import Advantages, StepRows, episode_scores
from learner.advantages.statistics import moments
from services.config.tree import AdvantageConfig


@describe(
    "RLOO",
    paper="Ahmadian et al. 2024, arXiv:2402.14740",
    episode={"A_E = score − mean of the others": "over the group's other episodes"},
    total={"A = A_E": "the same for every step of an episode"},
    terms={name: text for name, text in SCORES.items() if name != "F"},
)
def rloo(rows: StepRows, config: AdvantageConfig) -> Advantages:
    """Compute the advantages of all rows."""
    scores = episode_scores(rows, config.invalid_action_penalty)
    counted, which = counted_scores(rows, config)
    of = moments(counted, rows.group, which)
    others = (counted - of.row_mean) * (of.count / np.maximum(of.count - 1, 1))[of.group]
    # A penalty that is no part of the statistics is subtracted as it is.
    episode = np.where(of.row_count > 1, others - (counted - scores), scores)
    return Advantages(episode=episode, step=np.zeros(len(rows)), total=episode)
