"""Advantage estimators: one module each, chosen by `algorithm` in the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from learner.advantages.dapo import dapo
from learner.advantages.dr_grpo import dr_grpo
from learner.advantages.gigpo import gigpo
from learner.advantages.grpo import grpo
from learner.advantages.gspo import gspo
from learner.advantages.hgpo import hgpo
from learner.advantages.penalty import with_penalty
from learner.advantages.reinforce_pp import reinforce_pp
from learner.advantages.rloo import rloo
from learner.advantages.rows import Advantages, Estimator, StepRows
from services.config.presets import Algorithm

ESTIMATORS: Mapping[Algorithm, Estimator] = MappingProxyType(
    {
        "gigpo": with_penalty(gigpo),
        "grpo": with_penalty(grpo),
        "rloo": with_penalty(rloo),
        "reinforce_pp": with_penalty(reinforce_pp),
        "dr_grpo": with_penalty(dr_grpo),
        "dapo": with_penalty(dapo),
        "gspo": with_penalty(gspo),
        "hgpo": with_penalty(hgpo),
    }
)

__all__ = ["ESTIMATORS", "Advantages", "Estimator", "StepRows"]
