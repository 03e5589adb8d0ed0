from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from anchorage.cli import report, report_curves
from services.config.tree import Config
from services.errors import AnchorageError
from services.run_folder import SUMMARY_NAME
from services.telemetry import MetricsWriter
from tests.control_runs import evaluation, scalars

RATE = {"won": 1, "episodes": 4, "rate": 0.25, "interval_95": [0.05, 0.7]}


def run(folder: Path, updates: int) -> Path:
    with MetricsWriter(folder) as metrics:
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


def test_the_page_holds_no_credential(tmp_path: Path) -> None:
    tree = {"buffer": {"redis_url": "redis://:hidden-word@example:6379"}, "env": {"url": "http://me:hidden-word@a:1"}}
    text = report.write(run(tmp_path, 1), Config.model_validate(tree)).read_text()
    assert "redis://example:6379" in text
    assert "hidden-word" not in text


def test_a_training_run_has_tables_and_every_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with MetricsWriter(tmp_path) as metrics:
        metrics.write(0, evaluation(0))
        for update in range(1, 13):
            metrics.write(update, scalars(update))
        metrics.write(12, evaluation(12))
    drawn: list[str] = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_title", lambda self, title, **_: drawn.append(title))
    text = report.write(tmp_path, Config()).read_text()
    assert "<td>12</td><td>78.0 %</td><td>72.0 % – 84.0 %</td>" in text
    updates = text[text.index("Last updates") : text.index("Curves")]
    assert re.findall(r"<tr><td>(\d+)</td>", updates) == [str(update) for update in range(3, 13)]
    assert "12 of 100 updates" in text
    wanted = ("reward per episode", "KL to the reference", "step groups by size", "time of an update")
    assert [sum(title.startswith(name) for title in drawn) for name in wanted] == [1, 1, 1, 1]


def test_each_of_several_splits_has_rows_and_columns_of_its_own(tmp_path: Path) -> None:
    rates = {"evaluation/success_rate": 0.3, "evaluation/seen/success_rate": 0.5, "evaluation/unseen/success_rate": 0.1}
    with MetricsWriter(tmp_path) as metrics:
        metrics.write(0, rates | {"evaluation/seen/success_low": 0.4, "evaluation/seen/success_high": 0.6})
    part = {"success": RATE, "task_types": {}}
    result = part | {"splits": {"seen": part, "unseen": part}}
    (tmp_path / SUMMARY_NAME).write_text(json.dumps({"before": result, "after": result}))
    text = report.write(tmp_path, Config()).read_text()
    assert "<td>0, seen</td><td>50.0 %</td><td>40.0 % – 60.0 %</td>" in text
    assert "<td>0, unseen</td><td>10.0 %</td>" in text
    assert all(f">{when} training, {split}<" in text for when in ("before", "after") for split in ("seen", "unseen"))


def test_a_page_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (run(tmp_path, 1) / "report.html").mkdir()
    with pytest.raises(AnchorageError, match=r"cannot write .*report\.html: Is a directory"):
        report.write(tmp_path, Config())


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
    assert report_curves.terminal_curve([], "success") == "no update was made"
    assert "success" in report_curves.terminal_curve([(1, 0.2), (2, 0.4)], "success")
