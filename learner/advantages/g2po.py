"""G2PO: values of anchor states, and what each step gained (arXiv:2606.22995; code: Nala-YN/G2PO, g2po/core_g2po.py).

    o_t  = γ^(T − t) · R                          what a visit led to: T steps in the episode, t from 0, R its score
    V(s) = mean of o over all visits to s in the group
           V(s_{t+1}) after the last step is g if R = g, else 0      g is the reward of the goal
    L_t  = (V(s_{t+1}) − p_t − mean) / F          over the step group, 0 for a lone step
    D_t  = (V(s_{t+1}) − V(s_t) − mean) / F       over all steps of the group
    A_S  = L_t + D_t
    A_E  = (score − mean) / F                     over the group's episodes, as in GiGPO
    A    = A_E + ω·A_S                            the same for every token of a response

F is the standard deviation (ddof 1, + 1e-6), or 1. p_t is the penalty of an invalid step. The published code fixes γ at
0.95 and p at 0.1 whatever its configuration says; here they are `advantage.gamma` and `advantage.step_penalty`.
"""

from __future__ import annotations

import numpy as np

from learner.advantages.description import GROUP_SCORES, SCORES, describe
from learner.advantages.episodes import episode_advantages
from learner.advantages.rows import Advantages, Floats, StepRows, episode_scores, later_rows, powers, steps_left
from learner.advantages.statistics import moments, normalised
from services.config.tree import AdvantageConfig

EXACT = 1e-9
"""Largest difference of a score from the goal's reward, relative to it, that is rounding."""


@describe(
    "G2PO",
    paper="arXiv:2606.22995",
    episode=GROUP_SCORES,
    step={
        "L_t = (V_{t+1} − p_t − mean) / F": "over the steps taken in the same state; 0 for a lone step",
        "D_t = (V_{t+1} − V_t − mean) / F": "over all steps of the group: what was gained",
        "A_S = L_t + D_t": "both together",
    },
    total={"A = A_E + ω A_S": "the same for every token of a response"},
    terms={
        **SCORES,
        "V_t": "mean over all visits to the state of score · {gamma:g}^(steps to the end)",
        "V_{t+1}": "that of the next state; after the last step {goal_reward:g} if that is the score, else 0",
        "p_t": lambda config: f"{step_penalty(config):g} for an invalid action, else 0",
        "ω": "{omega:g}, weight of the step level",
    },
)
def g2po(rows: StepRows, config: AdvantageConfig) -> Advantages:
    """Compute the advantages of all rows."""
    episode = episode_advantages(rows, config)
    here, there = state_values(rows, config)
    wanted = there - step_penalty(config) * ~rows.valid
    local = normalised(wanted, moments(wanted, rows.step_group), rows, config)
    gain = there - here
    step = local + normalised(gain, moments(gain, rows.group), rows, config)
    return Advantages(episode=episode, step=step, total=episode + config.omega * step)


def state_values(rows: StepRows, config: AdvantageConfig) -> tuple[Floats, Floats]:
    """V(s_t) and V(s_{t+1}) of every row; [N] each."""
    scores, after = episode_scores(rows), later_rows(rows)
    outcome = scores * powers(config.gamma, steps_left(rows) + 1)
    here = moments(outcome, rows.step_group).row_mean
    reached = np.abs(scores - config.goal_reward) <= EXACT * config.goal_reward
    there: Floats = np.where(after >= 0, here[after], np.where(reached, config.goal_reward, 0.0))
    return here, there


def step_penalty(config: AdvantageConfig) -> float:
    """p of an invalid step."""
    return config.invalid_action_penalty if config.step_penalty is None else config.step_penalty
