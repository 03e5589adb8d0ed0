from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from rich.logging import RichHandler
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from services.config.tree import TelemetryConfig
from services.telemetry import MetricsUnwritable, MetricsWriter, open_metrics, setup_logging


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_record_is_one_line_at_once(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "run") as writer:
        writer.write(1, {"loss": 0.5, "nan": float("nan")})
        (record,) = records(tmp_path / "run")
        assert record.pop("time") > 0
        assert record == {"step": 1, "loss": 0.5, "nan": None}
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"metrics.jsonl"}


def test_reopening_appends(tmp_path: Path) -> None:
    for step in (1, 2):
        with MetricsWriter(tmp_path) as writer:
            writer.write(step, {})
    assert [record["step"] for record in records(tmp_path)] == [1, 2]


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    with open_metrics(tmp_path, TelemetryConfig()) as writer:
        for step in (1, 2, 3, 4):
            writer.write(step, {"loss": float(step)})
    with open_metrics(tmp_path, TelemetryConfig(), resume_step=2) as writer:
        for step in (3, 4, 5):
            writer.write(step, {"loss": 10.0 * step})
    expected = [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]
    assert [(record["step"], record["loss"]) for record in records(tmp_path)] == expected
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == expected


def test_resuming_before_the_first_step_empties_the_file(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {})
    MetricsWriter(tmp_path, resume_step=0).close()
    assert records(tmp_path) == []


def test_a_torn_line_spoils_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step":1}\n{"step":2,"lo')
    with caplog.at_level(logging.WARNING), MetricsWriter(tmp_path) as writer:
        writer.write(2, {})
    assert [record["step"] for record in records(tmp_path)] == [1, 2]
    assert "invalid line" in caplog.text


def test_an_unusable_folder_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MetricsUnwritable, match="cannot write metrics"):
        MetricsWriter(tmp_path / "file" / "run")


def test_a_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    writer = MetricsWriter.__new__(MetricsWriter)
    writer._path = tmp_path / "metrics.jsonl"
    writer._file = writer._path.open("ab")
    writer.trackers = []
    with pytest.raises(MetricsUnwritable, match="No space left on device"):
        writer.write(1, {})
    with pytest.raises(MetricsUnwritable):
        writer.close()


def test_plain_lines_without_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    setup_logging("INFO")
    logging.getLogger("services.x").info("ours")
    logging.getLogger("services.x").debug("too quiet")
    logging.getLogger("elsewhere").info("not ours")
    logging.getLogger("elsewhere").warning("their %s", "http://me:word@host:1/x")
    lines = capfd.readouterr().err.splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == [
        "INFO services.x: ours",
        "WARNING elsewhere: their http://host:1/x",
    ]


def test_rich_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    main, terminal = os.openpty()
    with os.fdopen(main, "rb"), os.fdopen(terminal, "w") as stream:
        monkeypatch.setattr("sys.stderr", stream)
        setup_logging("DEBUG")
        assert [type(handler) for handler in logging.getLogger().handlers] == [RichHandler]
        assert logging.getLogger("learner.x").isEnabledFor(logging.DEBUG)
