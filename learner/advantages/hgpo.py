"""HGPO: hierarchy-of-groups policy optimisation (He et al. 2026, arXiv:2602.22817).

    G_k(t) = steps of the group that were taken in the same state as t, after the same k states,   k = 0 … K
    A_k    = (R_t − mean) / F           over G_k(t), R the step returns of GiGPO
    A      = Σ_k w_k · A_k / Σ_k w_k    w_k = (k + 1)^α, over the k for which G_k(t) holds another step

the same for every token of a response; 0 where no other step was taken in the state. Deep groups compare like with
like but are small, shallow ones are large but mix histories. A step has no G_k for more states than came before it.
F is the standard deviation (ddof 1, + 1e-6), or 1. docs/algorithms.md says what was assumed beyond the paper.
"""

from __future__ import annotations

import numpy as np

from learner.advantages.description import RETURNS, describe, divisor, scaled_penalty
from learner.advantages.rows import Advantages, Floats, Ids, StepRows, earlier_rows, step_returns
from learner.advantages.statistics import moments, normalised
from learner.anchors import joint_ids
from services.config.tree import AdvantageConfig


@describe(
    "HGPO",
    paper="He et al. 2026, arXiv:2602.22817",
    step={
        "R_t = r_t + γ R_{t+1}": "what a step led to",
        "A_k = (R_t − mean) / F": "over the steps taken in the same state after the same k states; 0 for a lone step",
        "A_S = Σ w_k A_k / Σ w_k": "k = 0, 1, …: longer common histories weigh more",
    },
    total={"A = A_S": "an episode's score counts through what each of its steps led to"},
    terms={
        "F": divisor,
        **RETURNS,
        "k": "at most {history}",
        "w_k": "(k + 1)^{history_power:g}",
        "invalid action": scaled_penalty,
    },
)
def hgpo(rows: StepRows, config: AdvantageConfig) -> Advantages:
    """Compute the advantages of all rows."""
    returns = step_returns(rows, config.gamma, config.invalid_action_penalty)
    weighted, weights = np.zeros(len(rows)), np.zeros(len(rows))
    for depth, group in enumerate(history_groups(rows, config.history)):
        of = moments(returns, group)
        weight = (of.row_count > 1) * (depth + 1.0) ** config.history_power
        weighted += weight * normalised(returns, of, rows, config)
        weights += weight
    total: Floats = weighted / np.maximum(weights, 1.0)
    return Advantages(episode=np.zeros(len(rows)), step=total, total=total)


def history_groups(rows: StepRows, history: int) -> list[Ids]:
    """G_0 … G_K as group numbers, int64 [N] each; a step with too short a history is alone in its group."""
    before = earlier_rows(rows)
    place = np.arange(len(rows))
    ancestor, group = place, rows.step_group
    levels = [group]
    for _ in range(history):
        ancestor = np.where(ancestor >= 0, before[ancestor], -1)
        # Alone: a number of its own instead of a state's.
        state = np.where(ancestor >= 0, rows.step_group[ancestor], -1 - place)
        group = joint_ids(group, state)
        levels.append(group)
    return levels
