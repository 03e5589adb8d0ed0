"""Tracker for Weights & Biases: the only file that uses that package, which is an optional extra.

Invariants
- `mode: offline` does not use the network; `wandb sync` uploads its files.
- No machine statistics, no code and no console output are sent.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field

from services.tracking import RunInfo, require_package

KEY_VARIABLE = "WANDB_API_KEY"
STEP = "update"


class Params(BaseModel):
    mode: Literal["online", "offline"] = "online"
    """`online` requires a key in `$WANDB_API_KEY`; `offline` writes to the run's folder."""
    project: str = Field("anchorage", min_length=1, max_length=128)
    """Name of the project."""
    entity: str | None = None
    """User or team that owns the project. None: the default of the key."""


class WeightsAndBiases:
    """Writes to a W&B run of the same name. A resumed run continues it."""

    def __init__(self, run: RunInfo, params: Params) -> None:
        import wandb

        settings = wandb.Settings(
            silent=True, console="off", disable_git=True, disable_code=True, save_code=False, x_disable_stats=True
        )
        self._run: Any = wandb.init(
            mode=params.mode,
            dir=str(run.folder),
            project=params.project,
            entity=params.entity,
            id=run.name,
            name=run.name,
            resume="allow",
            config=dict(run.settings),
            settings=settings,
        )
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)

    @staticmethod
    def problem(params: Params) -> str | None:
        """Return why the tracker cannot work, without importing the package; None if it can."""
        if params.mode == "online" and not os.environ.get(KEY_VARIABLE):
            return f"telemetry.trackers=wandb requires a key in {KEY_VARIABLE}, or telemetry.params.wandb.mode=offline"
        return require_package("wandb", "pip install 'anchorage-rl[wandb]', or remove it from telemetry.trackers")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """See `services.tracking.Tracker`."""
        self._run.log({STEP: step, **scalars})

    def close(self) -> None:
        """See `services.tracking.Tracker`."""
        self._run.finish()
