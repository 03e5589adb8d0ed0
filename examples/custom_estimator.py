"""An advantage estimator of your own: the group's best episode is what the others are compared with, in part.

    anchorage train configs/demo.yaml algorithm=./examples/custom_estimator.py:half_best advantage.params.alpha=0.25

An estimator is a function of the steps of complete groups. Its parameters are validated before anything starts, and
the dashboard explains a run's advantages from its description. See docs/extending.md.
"""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel, Field

from learner.advantages import AdvantageConfig, Advantages, StepRows, describe, episode_scores, moments


class Params(BaseModel, extra="forbid"):
    alpha: float = Field(0.5, ge=0, le=1)
    """Weight of the best score in the baseline; 0: the mean alone."""


@describe(
    "Half best",
    episode={"A_E = score − (1 − α) mean − α best": "over the steps of the group's episodes"},
    total={"A = A_E": "the same for every token of an episode"},
    terms={"score": "sum of the episode's rewards", "best": "largest score of the group", "α": "{alpha:g}"},
)
def half_best(rows: StepRows, config: AdvantageConfig, params: Params) -> Advantages:
    """Advantages of every row, float64 [N].

    Example: two episodes of one step with scores 0 and 10, α = 0.5. The baseline is 0.5 · 5 + 0.5 · 10 = 7.5, so the
    advantages are −7.5 and 2.5.
    """
    scores = episode_scores(rows, config.invalid_action_penalty)
    of = moments(scores, rows.group)
    best = np.full(len(of.mean), -np.inf)
    np.maximum.at(best, of.group, scores)
    episode = scores - (1 - params.alpha) * of.row_mean - params.alpha * best[of.group]
    return Advantages(episode=episode, step=np.zeros(len(rows)), total=episode)
