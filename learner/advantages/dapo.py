"""DAPO: decoupled clip and dynamic sampling policy optimisation (Yu et al. 2025, arXiv:2503.14476).

    A = (score − mean) / F              over the group's episodes               (eq. 9)

for every step of the episode, as in GRPO. What the paper adds is this algorithm's preset:
    clip-higher          ratio ≤ 1 + 0.28, so that unlikely tokens can gain                             (section 3.1)
    dynamic sampling     groups of equal reward have no gradient: dropped, further ones in their place  (eq. 11)
    token-level loss     one mean over all tokens of the update                                         (eq. 12)
    no KL term                                                                                          (section 2.3)
Its shaping of the reward of over-long responses (section 3.4) is not done: a step's response has its limit, and an
episode that is cut has earned no reward.
"""

from __future__ import annotations

from learner.advantages.description import GROUP_SCORES, SCORES, describe
from learner.advantages.grpo import grpo
from learner.advantages.rows import Advantages, StepRows
from services.config.tree import AdvantageConfig


@describe(
    "DAPO",
    paper="Yu et al. 2025, arXiv:2503.14476",
    episode=GROUP_SCORES,
    total={"A = A_E": "the same for every step of an episode"},
    terms=SCORES,
)
def dapo(rows: StepRows, config: AdvantageConfig) -> Advantages:
    """Compute the advantages of all rows."""
    return grpo(rows, config)
