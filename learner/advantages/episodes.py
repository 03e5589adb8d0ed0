"""Episode level that estimators share: the scores that the statistics are computed over, and A_E.

Invariants
- Over step rows, every row counts with its own penalty, as in the published code: a score is compared with a set that
  contains it.
- Over trajectories, each counts once with its score without penalties. A step's penalty is then not part of the
  deviation that divides it, and where all scores are equal it is not divided at all.
"""

from __future__ import annotations

import numpy as np

from learner.advantages.rows import EPSILON, Flags, Floats, StepRows, episode_scores, first_rows
from learner.advantages.statistics import moments, normalised
from services.config.tree import AdvantageConfig


def counted_scores(rows: StepRows, config: AdvantageConfig) -> tuple[Floats, Flags | None]:
    """Scores for the episode statistics, float64 [N], and the rows that count, bool [N]; None: all rows."""
    if config.episode_statistics == "trajectories":
        return episode_scores(rows), first_rows(rows)
    return episode_scores(rows, config.invalid_action_penalty), None


def episode_advantages(rows: StepRows, config: AdvantageConfig) -> Floats:
    """A_E = (score − mean) / F over the group (GiGPO, eq. 3); the score itself in a group of one; [N]."""
    scores = episode_scores(rows, config.invalid_action_penalty)
    counted, which = counted_scores(rows, config)
    of = moments(counted, rows.group, which)
    # The published code gives a lone score mean 0 and deviation 1.
    lone_scale = 1.0 + EPSILON if config.normalisation == "std" else 1.0
    return np.where(of.row_count > 1, normalised(scores, of, rows, config), scores / lone_scale)
