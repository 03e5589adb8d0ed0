"""What every built-in estimator would have said of groups that were played: their advantages, side by side.

Invariants
- Estimators are pure functions of the stored rows, so nothing is played again and nothing of the run is changed.
- All are given the same groups and the run's settings, except for what an algorithm's own preset sets of them.

Example: a group of a run with `algorithm=grpo`, γ 0.95. GiGPO is computed with γ 0.95; GraphGPO with 0.1, its preset.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from learner.advantages import ESTIMATORS
from learner.advantages.rows import Floats
from learner.prepare import step_rows
from services.config.presets import PRESETS
from services.config.tree import Config
from services.schemas import Trajectory


def compare(config: Config, groups: Sequence[Sequence[Trajectory]], place: int) -> dict[str, Floats]:
    """Compute the advantages of one group's turns by every built-in estimator.

    Args:
        config: of the run.
        groups: all groups of the update: some estimators compare over them.
        place: of the group among them.

    Returns:
        float64 [turns] for each algorithm, in the order of member and turn.
    """
    found = {}
    for name, estimator in ESTIMATORS.items():
        preset = PRESETS.get(name, {}).get("advantage", {})
        own = config.model_copy(
            update={"algorithm": name, "advantage": config.advantage.model_copy(update=dict(preset))}
        )
        rows = step_rows(groups, own)
        total = estimator(rows, own.advantage).total[rows.group == place]
        found[name] = np.nan_to_num(total, posinf=0.0, neginf=0.0)
    return found
