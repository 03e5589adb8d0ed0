"""GSPO: group sequence policy optimisation (Zheng et al. 2025, arXiv:2507.18071).

    A = (score − mean) / F              over the group's episodes               (eq. 6)
    s = (π(y) / π_old(y))^(1/|y|)       the ratio that is clipped               (eq. 7)

for every step of the episode; the sequence y is a step's response. The ratio, its narrow clip and the mean over
responses (eq. 5) are this algorithm's preset; the loss is in `learner.rank.losses`.
"""

from __future__ import annotations

from learner.advantages.description import GROUP_SCORES, SCORES, describe
from learner.advantages.grpo import grpo
from learner.advantages.rows import Advantages, StepRows
from services.config.tree import AdvantageConfig


@describe(
    "GSPO",
    paper="Zheng et al. 2025, arXiv:2507.18071",
    episode=GROUP_SCORES,
    total={"A = A_E": "the same for every step of an episode"},
    terms=SCORES,
)
def gspo(rows: StepRows, config: AdvantageConfig) -> Advantages:
    """Compute the advantages of all rows."""
    return grpo(rows, config)
