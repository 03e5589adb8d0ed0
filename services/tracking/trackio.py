"""Tracker for trackio, which keeps a local database: the only file that uses that package, which is optional."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pydantic import BaseModel, Field

from services.tracking import RunInfo, flat, require_package


class Params(BaseModel):
    project: str = Field("anchorage", min_length=1)
    """Name of the project."""
    space_id: str | None = None
    """Hugging Face Space that shows the project. None: only the local database (`trackio show`)."""


class Trackio:
    """Writes to a trackio run of the same name. A resumed run continues it."""

    def __init__(self, run: RunInfo, params: Params) -> None:
        import trackio

        self._run = trackio.init(
            project=params.project,
            name=run.name,
            space_id=params.space_id,
            config=flat(run.settings),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    @staticmethod
    def problem(params: Params) -> str | None:
        """Return why the tracker cannot work, without importing the package; None if it can."""
        return require_package("trackio", "pip install trackio, or remove it from telemetry.trackers")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """See `services.tracking.Tracker`. Drops NaN and infinities, which trackio's database cannot hold."""
        self._run.log({name: value for name, value in scalars.items() if math.isfinite(value)}, step=step)

    def close(self) -> None:
        """See `services.tracking.Tracker`."""
        self._run.finish()
