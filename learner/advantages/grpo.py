"""GRPO: group relative policy optimisation (Shao et al. 2024, arXiv:2402.03300, section 4.1), outcome supervision.

    A = (score − mean) / F              over the group's episodes

for every step of the episode. F is the standard deviation (ddof 1, + 1e-6), or 1 (Dr. GRPO).
"""

from __future__ import annotations

import numpy as np

from learner.advantages.description import GROUP_SCORES, SCORES, describe
from learner.advantages.episodes import episode_advantages
from learner.advantages.rows import Advantages, StepRows
from services.config.tree import AdvantageConfig


@describe(
    "GRPO",
    paper="Shao et al. 2024, arXiv:2402.03300",
    episode=GROUP_SCORES,
    total={"A = A_E": "the same for every step of an episode"},
    terms=SCORES,
)
def grpo(rows: StepRows, config: AdvantageConfig) -> Advantages:
    """Compute the advantages of all rows."""
    episode = episode_advantages(rows, config)
    return Advantages(episode=episode, step=np.zeros(len(rows)), total=episode)
