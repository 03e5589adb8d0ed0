from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.cli import report
from services.config.tree import Config
from services.errors import AnchorageError
from services.run_folder import SUMMARY_NAME
from services.telemetry import MetricsWriter

RATE = {"won": 1, "episodes": 4, "rate": 0.25, "interval_95": [0.05, 0.7]}


def run(folder: Path, updates: int) -> Path:
    with MetricsWriter(folder, tensorboard=False) as metrics:
        metrics.write(0, {"evaluation/success_rate": 0.25})
        for update in range(1, updates + 1):
            metrics.write(update, {"rollout/success_rate": update / 10, "loss/entropy": float("nan")})
    return folder


def test_the_page_holds_results_curves_and_configuration(tmp_path: Path) -> None:
    folder = run(tmp_path, 4)
    result = {"success": RATE, "task_types": {"<two>": RATE}}
    (folder / SUMMARY_NAME).write_text(json.dumps({"before": result, "after": result | {"task_types": {}}}))
    text = report.write(folder, Config()).read_text()
    assert "25.0 % (5–70), n = 4" in text
    assert "<td>&lt;two&gt;</td>" in text
    assert "data:image/png;base64," in text
    assert "groups_per_update" in text


def test_several_runs_make_one_picture(tmp_path: Path) -> None:
    picture = tmp_path / "both.png"
    report.write_picture([run(tmp_path / "gigpo", 5), run(tmp_path / "grpo", 3)], picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_metrics_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(AnchorageError, match=r"holds no metrics\.jsonl"):
        report.write_picture([tmp_path], tmp_path / "picture.png")


def test_a_picture_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(AnchorageError, match="cannot write"):
        report.write_picture([run(tmp_path, 1)], tmp_path / "missing" / "picture.png")


def test_the_curve_in_the_terminal_needs_an_update() -> None:
    assert report.terminal_curve([], "success") == "no update was made"
    assert "success" in report.terminal_curve([(1, 0.2), (2, 0.4)], "success")
