"""Where the penalty of invalid actions is applied: before the normalisation, or to the finished advantage.

With `advantage.penalty: scaled` estimators lower scores and returns before they normalise them, as published. In a
group whose episodes all have the same reward, only the penalties differ, and `std` scales them to unit variance. With
`unscaled`, an estimator sees no penalty; afterwards each invalid step's advantage is lowered by it, once.

Example: 8 episodes of 50 steps that all fail, one invalid step, penalty 0.1, `std` over step rows. That step's A_E is
−19.95 scaled and −0.1 unscaled; every other step's 0.05 and 0.
"""

from __future__ import annotations

from dataclasses import replace
from functools import wraps

from learner.advantages.rows import Advantages, Estimator, StepRows
from services.config.tree import AdvantageConfig


def with_penalty(estimator: Estimator) -> Estimator:
    """Wrap an estimator so that the penalty is applied where `config.penalty` says."""

    @wraps(estimator)
    def penalised(rows: StepRows, config: AdvantageConfig) -> Advantages:
        found = estimator(rows, before_normalisation(config))
        if config.penalty == "scaled":
            return found
        penalty = config.invalid_action_penalty * ~rows.valid
        return replace(found, episode=found.episode - penalty, total=found.total - penalty)

    return penalised


def before_normalisation(config: AdvantageConfig) -> AdvantageConfig:
    """Return the configuration with the penalty to subtract before normalisation: 0 where it is unscaled."""
    if config.penalty == "scaled":
        return config
    return config.model_copy(update={"invalid_action_penalty": 0.0, "step_penalty": None})
