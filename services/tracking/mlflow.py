"""A run's metrics for MLflow: the only file that knows that package, which is optional (`mlflow-skinny` is enough).

Invariants
- The id of the run at MLflow lies in the run's folder, so a resumed run continues it.
- One request an update; MLflow's own state of the process (its active run) is not touched.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping

from pydantic import BaseModel, Field

from services.tracking import RunInfo, flat, require_package

ID_NAME = "mlflow.run"
STORE_NAME = "mlruns"
LONGEST_PARAM = 500
_FORBIDDEN = re.compile(r"[^\w\-./ ]")


class Params(BaseModel):
    uri: str | None = None
    """Tracking server, or store; none: `$MLFLOW_TRACKING_URI`, else `mlruns` in the run's folder."""
    experiment: str = Field("anchorage", min_length=1)


class MLflow:
    """One run of the same name in an experiment, which is made where it does not exist."""

    def __init__(self, run: RunInfo, params: Params) -> None:
        store = params.uri or os.environ.get("MLFLOW_TRACKING_URI")
        if store is None:
            # MLflow 3 asks for this before it uses a folder as its store; a run's own folder is all that is needed.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            store = (run.folder / STORE_NAME).resolve().as_uri()
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric = Metric
        self._client = MlflowClient(tracking_uri=store)
        file = run.folder / ID_NAME
        if file.exists():
            self._id = file.read_text().strip()
            self._client.update_run(self._id, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(params.experiment)
        experiment = self._client.create_experiment(params.experiment) if found is None else found.experiment_id
        self._id = self._client.create_run(experiment, run_name=run.name).info.run_id
        file.write_text(self._id + "\n")
        settings = [Param(name, str(value)[:LONGEST_PARAM]) for name, value in flat(run.settings).items()]
        for start in range(0, len(settings), 100):  # the most that one request may hold
            self._client.log_batch(self._id, params=settings[start : start + 100])

    @staticmethod
    def problem(params: Params) -> str | None:
        """Why it cannot work. Does not import the package."""
        return require_package("mlflow", "pip install mlflow-skinny, or leave it out of telemetry.trackers")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """See `services.tracking.Tracker`."""
        now = time.time_ns() // 1_000_000
        metrics = [self._metric(_FORBIDDEN.sub("_", name), value, now, step) for name, value in scalars.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        """See `services.tracking.Tracker`."""
        self._client.set_terminated(self._id)
