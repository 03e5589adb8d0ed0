"""Grafana asks for metrics that are there: every name in its panels is one that a real exporter answers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from env_servers.registry import load_environment
from env_servers.server.app import create_app
from env_servers.server.settings import ServerSettings
from learner.evaluation import Rate, summarise
from learner.report import Timings, UpdateReport
from services.control import exporter
from services.control.runs import Runs
from services.telemetry import MetricsWriter
from tests.control_runs import make_live

OBSERVE = Path(__file__).resolve().parents[2] / "deploy" / "observe"
BOARD = json.loads((OBSERVE / "grafana" / "dashboards" / "anchorage.json").read_text())
EXPRESSIONS = [target["expr"] for panel in BOARD["panels"] for target in panel.get("targets", [])]


def names(page: str) -> set[str]:
    return {sample.name for family in text_string_to_metric_families(page) for sample in family.samples}


def update() -> UpdateReport:
    """As the trainer makes it."""
    return UpdateReport(
        **{"update": 7, "episodes": 8, "success_rate": 0.5, "mean_reward": 5.0, "mean_steps": 9.0},
        **{
            "valid_fraction": 0.9,
            "rows": 72,
            "trained_rows": 70,
            "response_tokens": 700,
            "step_group_sizes": {1: 5, 3: 2},
        },
        **{"step_group_size_mean": 1.6, "advantage_deviation": 1.0, "cut_fraction": 0.0, "staleness_mean": 0.5},
        **{"staleness_max": 1, "dropped_stale": 0, "dropped_equal": 0, "dropped_unreadable": 0, "cancelled": 0},
        **{"prompt_truncated": 0.0, "tokens_per_second": 900.0},
        timings=Timings(1.0, 1.0, 1.0, 1.0),
        loss={},
    )


@pytest.fixture
def exported(tmp_path: Path, redis_url: str, run_name: str) -> Iterator[set[str]]:
    """Names of all that control plane and environment servers export, of a live run with real records."""
    config, buffer = make_live(tmp_path, run_name, redis_url)
    (config.run.folder / "metrics.jsonl").unlink()
    with MetricsWriter(config.run.folder) as metrics:
        metrics.write(7, update().scalars())
        metrics.write(
            7, summarise([], stream="eval", split="test").scalars() | {"evaluation/success_rate": Rate(1, 2).value}
        )
    runs = Runs(tmp_path)
    app = create_app(load_environment("alfworld"), ServerSettings())
    with TestClient(app) as client:
        yield names(exporter.page(runs.all()).decode()) | names(client.get("/metrics").text)
    runs.close()
    buffer.close()


def test_every_panel_asks_for_what_is_exported(exported: set[str]) -> None:
    asked = {name for text in EXPRESSIONS for name in re.findall(r"\banchorage_\w+", text)}
    assert len(asked) >= 10
    assert any(name.startswith("anchorage_learner_") for name in asked)
    assert asked - exported == set()
    for variable in BOARD["templating"]["list"]:
        assert set(re.findall(r"\banchorage_\w+", variable["query"])) <= exported


def test_no_panel_is_empty_and_grafana_asks_prometheus() -> None:
    assert all(panel["targets"] for panel in BOARD["panels"] if panel["type"] != "row")
    source = yaml.safe_load((OBSERVE / "grafana/datasources/prometheus.yml").read_text())
    assert source["datasources"][0]["url"] == "http://prometheus:9090"
    assert {target["datasource"]["uid"] for target in BOARD["panels"]} == {source["datasources"][0]["uid"]}
