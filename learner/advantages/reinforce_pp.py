"""REINFORCE++: advantages normalised over the whole batch (Hu et al. 2025, arXiv:2501.03262).

    A = (b − mean over the batch of b) / F

for every step of the episode, over the episodes of all groups together. b is the score (REINFORCE++), or with
`group_baseline` the score − mean of its group (REINFORCE++-baseline). F is the standard deviation (ddof 1, + 1e-6),
or 1. The paper's KL penalty in the reward, − β · Σ_{s ≥ t} k1_s of the response's tokens, is added in
`learner.rank.losses`.
"""

from __future__ import annotations

import numpy as np

from learner.advantages.description import SCORES, describe
from learner.advantages.episodes import counted_scores
from learner.advantages.rows import Advantages, StepRows, episode_scores
from learner.advantages.statistics import moments, normalised
from services.config.tree import AdvantageConfig


@describe(
    "REINFORCE++",
    paper="Hu et al. 2025, arXiv:2501.03262",
    episode={"A_E = (b − mean) / F": "over all groups of the update"},
    total={"A = A_E": "the same for every step of an episode"},
    terms={
        **SCORES,
        "b": lambda config: "the score less the mean of its group" if config.group_baseline else "the score",
    },
)
def reinforce_pp(rows: StepRows, config: AdvantageConfig) -> Advantages:
    """Compute the advantages of all rows."""
    counted, which = counted_scores(rows, config)
    scores = episode_scores(rows, config.invalid_action_penalty)
    if config.group_baseline:
        baseline = moments(counted, rows.group, which).row_mean
        counted, scores = counted - baseline, scores - baseline
    batch = np.zeros(len(rows), dtype=np.int64)
    episode = normalised(scores, moments(counted, batch, which), rows, config)
    return Advantages(episode=episode, step=np.zeros(len(rows)), total=episode)
