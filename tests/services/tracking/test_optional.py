"""MLflow and trackio: with the real packages where they are installed, offline, and one line where they are not."""

import math
import sqlite3
import sys

import pytest

from services.config.tree import TelemetryConfig
from services.telemetry import open_metrics
from services.tracking import check
from tests import needs

NUMBERS = {"rollout/success_rate": 0.25, "loss/kl": math.nan}


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "trackio"])
def test_without_the_package_there_is_one_line(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    [line] = check(TelemetryConfig(trackers=(name,)))
    assert line.startswith(f"telemetry.trackers={name} requires the package {name}: pip install ")


def test_mlflow_keeps_a_run_and_a_resumed_one_continues_it(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason=needs.MLFLOW)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    from mlflow.tracking import MlflowClient

    config, folder = TelemetryConfig(trackers=("mlflow",)), tmp_path / "first"
    with open_metrics(folder, config, settings={"learner": {"updates": 2}}) as metrics:
        metrics.write(1, NUMBERS)
    with open_metrics(folder, config, resume_step=1) as metrics:
        metrics.write(2, NUMBERS)
    client = MlflowClient(tracking_uri=(folder / "mlruns").resolve().as_uri())
    [run] = client.search_runs([client.get_experiment_by_name("anchorage").experiment_id])
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert run.data.params["learner.updates"] == "2"
    history = client.get_metric_history(run.info.run_id, "rollout/success_rate")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.25), (2, 0.25)]


def test_trackio_keeps_a_run_in_its_local_database(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # which is read when the package is imported
    pytest.importorskip("trackio", reason=needs.TRACKIO)
    config, folder = TelemetryConfig(trackers=("trackio",)), tmp_path / "first"
    with open_metrics(folder, config) as metrics:
        metrics.write(1, NUMBERS)
        metrics.write(2, NUMBERS)
    [file] = (tmp_path / "trackio").glob("anchorage*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("select step, metrics from metrics where run_name = 'first' order by step").fetchall()
    assert [step for step, _ in rows] == [1, 2]
    assert b"rollout/success_rate" in bytes(rows[0][1])
