"""GraphGPO: graph-based group policy optimisation (arXiv:2605.26684; code: verl-agent, recipe/GraphGPO).

    d(s) = fewest steps from state s to the goal, along the steps of all the group's episodes; a state that cannot
           reach it is one further than the furthest that can
    G_t  = g · γ^d(s_{t+1})                       or g · γ^(d(s_{t+1}) − d(s_t) + 1) with `normalize_distance`
    A_S  = (G_t − mean) / F                       over the step group, 0 for a lone step
    A_E  = (score − mean) / F                     over the group's episodes, as in GiGPO
    A    = w_E·A_E + ω·A_S                        the same for every token of a response

g is the reward of the goal; an episode reached it if its score is positive, as in the published code. So a step of a
lost episode that brought it nearer to a goal that others reached is worth as much as theirs. F is the standard
deviation (ddof 1, + 1e-6), or 1. The penalty lowers an invalid step's score and G before they are normalised.
"""

from __future__ import annotations

from learner.advantages.description import GROUP_SCORES, SCORES, describe
from learner.advantages.episodes import episode_advantages
from learner.advantages.graph import distances
from learner.advantages.rows import Advantages, Floats, StepRows, episode_scores, powers
from learner.advantages.statistics import NEGLIGIBLE, moments, normalised
from services.config.tree import AdvantageConfig


def _worth(config: AdvantageConfig) -> str:
    how = "d(s_{t+1}) − d(s_t) + 1" if config.normalize_distance else "d(s_{t+1})"
    return f"{config.goal_reward:g} · {config.gamma:g}^({how}), d: fewest steps to the goal in the group's graph"


@describe(
    "GraphGPO",
    paper="arXiv:2605.26684",
    episode=GROUP_SCORES,
    step={"A_S = (G_t − mean) / F": "over the steps taken in the same state; 0 for a lone step"},
    total={"A = w_E A_E + ω A_S": "the same for every token of a response"},
    terms={
        **SCORES,
        "G_t": _worth,
        "w_E": "{episode_weight:g}, weight of the episode level",
        "ω": "{omega:g}, weight of the step level",
    },
)
def graphgpo(rows: StepRows, config: AdvantageConfig) -> Advantages:
    """Compute the advantages of all rows."""
    episode = episode_advantages(rows, config)
    worth = step_worths(rows, config) - config.invalid_action_penalty * ~rows.valid
    step = normalised(worth, moments(worth, rows.step_group), rows, config, noise=NEGLIGIBLE)
    return Advantages(episode=episode, step=step, total=config.episode_weight * episode + config.omega * step)


def step_worths(rows: StepRows, config: AdvantageConfig) -> Floats:
    """G_t of every row; [N]."""
    away = distances(rows, episode_scores(rows) > 0)
    steps = away.there - away.here + 1 if config.normalize_distance else away.there
    return config.goal_reward * powers(config.gamma, steps)
