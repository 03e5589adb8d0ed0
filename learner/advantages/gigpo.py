"""GiGPO: group-in-group policy optimisation (Feng et al. 2025, arXiv:2505.10978).

    A_E = (score − mean) / F            over the group's episodes               (eq. 3)
    R_t = r_t + γ·R_{t+1}                                                       (eq. 5)
    A_S = (R_t − mean) / F              over the step group, 0 for a lone step  (eq. 6, 7)
    A   = A_E + ω·A_S                   the same for every token of a response  (eq. 8)

F is the standard deviation (ddof 1, + 1e-6), or 1. An invalid step's own score and return are lowered by a penalty.
"""

from __future__ import annotations

from learner.advantages.description import GROUP_SCORES, RETURNS, SCORES, describe
from learner.advantages.episodes import episode_advantages
from learner.advantages.rows import Advantages, Floats, StepRows, step_returns
from learner.advantages.statistics import moments, normalised
from services.config.tree import AdvantageConfig


@describe(
    "GiGPO",
    paper="Feng et al. 2025, arXiv:2505.10978",
    episode=GROUP_SCORES,
    step={
        "R_t = r_t + γ R_{t+1}": "what a step led to",
        "A_S = (R_t − mean) / F": "over the steps taken in the same state; 0 for a lone step",
    },
    total={"A = A_E + ω A_S": "the same for every token of a response"},
    terms={**SCORES, **RETURNS, "ω": "{omega:g}, weight of the step level"},
)
def gigpo(rows: StepRows, config: AdvantageConfig) -> Advantages:
    """Compute the advantages of all rows."""
    episode = episode_advantages(rows, config)
    step = step_advantages(rows, config)
    return Advantages(episode=episode, step=step, total=episode + config.omega * step)


def step_advantages(rows: StepRows, config: AdvantageConfig) -> Floats:
    """A_S of every row; [N]."""
    returns = step_returns(rows, config.gamma, config.invalid_action_penalty)
    of = moments(returns, rows.step_group)
    # A lone return is its own mean: 0.
    return normalised(returns, of, rows, config)
