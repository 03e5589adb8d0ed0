"""Advantage estimators: one module each, chosen by `algorithm` in the configuration; plug-ins come in the same way.

What is imported from here is what an estimator of your own needs, see docs/extending.md.
"""

from __future__ import annotations

from learner.advantages.description import describe
from learner.advantages.loading import ESTIMATORS, LoadedEstimator, estimator_of, load_estimator
from learner.advantages.rows import Advantages, Estimator, StepRows, episode_scores, first_rows, step_returns
from learner.advantages.statistics import moments, normalised
from services.config.tree import AdvantageConfig

__all__ = [
    "ESTIMATORS",
    "AdvantageConfig",
    "Advantages",
    "Estimator",
    "LoadedEstimator",
    "StepRows",
    "describe",
    "episode_scores",
    "estimator_of",
    "first_rows",
    "load_estimator",
    "moments",
    "normalised",
    "step_returns",
]
