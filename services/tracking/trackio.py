"""A run's metrics for trackio, a local tracker: the only file that knows that package, which is optional."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pydantic import BaseModel, Field

from services.tracking import RunInfo, flat, require_package


class Params(BaseModel):
    project: str = Field("anchorage", min_length=1)
    space_id: str | None = None
    """Hugging Face Space that shows the project; none: the local database alone (`trackio show`)."""


class Trackio:
    """One run of the same name in a project. A resumed run continues it."""

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
        """Why it cannot work. Does not import the package."""
        return require_package("trackio", "pip install trackio, or leave it out of telemetry.trackers")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """See `services.tracking.Tracker`. What is not finite is left out: its database has no such number."""
        self._run.log({name: value for name, value in scalars.items() if math.isfinite(value)}, step=step)

    def close(self) -> None:
        """See `services.tracking.Tracker`."""
        self._run.finish()
