"""A run's metrics for Weights & Biases: the only file that knows that package, which is an optional extra.

Invariants
- `mode: offline` reaches no network; `wandb sync` sends what it wrote.
- Nothing of the machine, of the code or of the console is sent.
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
    """`online` needs a key in `$WANDB_API_KEY`; `offline` writes into the run's folder."""
    project: str = Field("anchorage", min_length=1, max_length=128)
    entity: str | None = None
    """User or team; none: the key's own."""


class WeightsAndBiases:
    """One run of the same name there. A resumed run continues it."""

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
        """Why it cannot work. Does not import the package."""
        if params.mode == "online" and not os.environ.get(KEY_VARIABLE):
            return f"telemetry.trackers=wandb needs a key in {KEY_VARIABLE}; or set telemetry.params.wandb.mode=offline"
        return require_package("wandb", "pip install 'anchorage-rl[wandb]', or leave it out of telemetry.trackers")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """See `services.tracking.Tracker`."""
        self._run.log({STEP: step, **scalars})

    def close(self) -> None:
        """See `services.tracking.Tracker`."""
        self._run.finish()
