"""Learning rate over a run.

Invariants
- A function of the number of optimizer steps done and the configuration alone, so that a resumed run continues it.
"""

from __future__ import annotations

import math

from services.config.tree import Config

FINAL_SHARE = 0.1
"""Share of the peak rate at which a falling schedule ends."""


def rate_factor(step: int, config: Config) -> float:
    """Share of the peak learning rate at an optimizer step.

    Args:
        step: number of the optimizer step in the run, from 0.
        config: of the run.

    Example: 10 updates of one optimizer step, 2 of them warm-up, linear: 0.5, 1.0, 1.0, 0.89, ..., 0.21.
    """
    optimizer, per_update = config.optimizer, config.learner.minibatches
    warmup, total = optimizer.warmup_updates * per_update, config.learner.updates * per_update
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    left = {"constant": 1.0, "linear": 1.0 - progress, "cosine": (1.0 + math.cos(math.pi * progress)) / 2}
    return FINAL_SHARE + (1.0 - FINAL_SHARE) * left[optimizer.schedule]
