"""Advantage estimators: one module each, chosen by `algorithm` in the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from learner.advantages.gigpo import gigpo
from learner.advantages.grpo import grpo
from learner.advantages.rloo import rloo
from learner.advantages.rows import Advantages, Estimator, StepRows

ESTIMATORS: Mapping[str, Estimator] = MappingProxyType({"gigpo": gigpo, "grpo": grpo, "rloo": rloo})

__all__ = ["ESTIMATORS", "Advantages", "Estimator", "StepRows"]
