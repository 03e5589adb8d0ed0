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
from learner.advantages.reinforce_pp import reinforce_pp
from learner.advantages.rloo import rloo
from learner.advantages.rows import Advantages, Estimator, StepRows
from services.config.presets import Algorithm

ESTIMATORS: Mapping[Algorithm, Estimator] = MappingProxyType(
    {
        "gigpo": gigpo,
        "grpo": grpo,
        "rloo": rloo,
        "reinforce_pp": reinforce_pp,
        "dr_grpo": dr_grpo,
        "dapo": dapo,
        "gspo": gspo,
        "hgpo": hgpo,
    }
)

__all__ = ["ESTIMATORS", "Advantages", "Estimator", "StepRows"]
