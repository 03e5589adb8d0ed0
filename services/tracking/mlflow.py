"""Tracker for MLflow: the only file that uses that package, which is optional (`mlflow-skinny` is enough).

Invariants
- The id of the MLflow run is kept in the run's folder, so that a resumed run continues it.
- There is one request per update. MLflow's state of the process (its active run) is not changed.
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
    """URI of a tracking server or store. None: `$MLFLOW_TRACKING_URI`, or else `mlruns` in the run's folder."""
    experiment: str = Field("anchorage", min_length=1)
    """Name of the experiment."""


class MLflow:
    """Writes to an MLflow run of the same name, in an experiment that is created if it does not exist."""

    def __init__(self, run: RunInfo, params: Params) -> None:
        store = params.uri or os.environ.get("MLFLOW_TRACKING_URI")
        if store is None:
            # MLflow 3 requires this before it uses a folder as its store, which is enough for a single run.
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
        for start in range(0, len(settings), 100):  # the maximum of one request
            self._client.log_batch(self._id, params=settings[start : start + 100])

    @staticmethod
    def problem(params: Params) -> str | None:
        """Return why the tracker cannot work, without importing the package; None if it can."""
        return require_package("mlflow", "pip install mlflow-skinny, or remove it from telemetry.trackers")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """See `services.tracking.Tracker`."""
        now = time.time_ns() // 1_000_000
        metrics = [self._metric(_FORBIDDEN.sub("_", name), value, now, step) for name, value in scalars.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        """See `services.tracking.Tracker`."""
        self._client.set_terminated(self._id)
