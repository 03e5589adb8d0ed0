"""Dr. GRPO: GRPO without its two biases (Liu et al. 2025, arXiv:2503.20783, section 3.2).

    A = score − mean                    over the group's episodes

for every step of the episode: groups of small deviation weigh no more than others. And the token losses of a response
are summed and divided by a constant, not by the response's length: long wrong responses weigh as much as short ones.
The advantage is GRPO's with `normalisation: mean`; that, the aggregation and no KL term are the algorithm's preset.
"""

from __future__ import annotations

from learner.advantages.description import GROUP_SCORES, SCORES, describe
from learner.advantages.grpo import grpo
from learner.advantages.rows import Advantages, StepRows
from services.config.tree import AdvantageConfig


@describe(
    "Dr. GRPO",
    paper="Liu et al. 2025, arXiv:2503.20783",
    episode=GROUP_SCORES,
    total={"A = A_E": "the same for every step of an episode"},
    terms=SCORES,
)
def dr_grpo(rows: StepRows, config: AdvantageConfig) -> Advantages:
    """Compute the advantages of all rows."""
    return grpo(rows, config)
