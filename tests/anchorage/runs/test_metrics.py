"""Figures of a run from its metrics: records, evaluations, and lines that are neither."""

from __future__ import annotations

from pathlib import Path

import pytest

from anchorage.runs.metrics import evaluations, read_metrics
from tests.control_runs import make_finished


def test_a_torn_line_is_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_finished(tmp_path, updates=3).run.folder
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 4, "rollout/succ')
    assert [record["step"] for record in read_metrics(folder)] == [0, 1, 2, 3, 3]
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder / 'metrics.jsonl'}: skipped 1 invalid of 6 lines"
    ]


@pytest.mark.parametrize(
    "line", ['{"step": "x"}', '{"step": NaN}', '{"step": 1e400}', '{"step": 1, "a": "NaN"}', "[]", "null", "{"]
)
def test_a_broken_line_of_the_metrics_is_left_out(tmp_path: Path, line: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "loss/loss": 0.5}}\n{line}\n')
    assert read_metrics(tmp_path) == [{"step": 1, "loss/loss": 0.5}]
    assert "skipped 1 invalid of 2 lines" in caplog.text


def test_an_evaluation_of_several_splits_is_a_row_for_all_and_one_each() -> None:
    records = [
        {
            "step": 0,
            "evaluation/success_rate": 0.3,
            "evaluation/seen/success_rate": 0.5,
            "evaluation/seen/mean_steps": 4,
        },
        {"step": 1, "rollout/success_rate": 0.4},
        {"step": 2, "evaluation/success_rate": 0.6, "evaluation/success_low": 0.5},
    ]
    rows = list(evaluations(records))
    assert [(row["update"], row["split"], row["success_rate"]) for row in rows] == [
        (0, None, 0.3),
        (0, "seen", 0.5),
        (2, None, 0.6),
    ]
    assert (rows[1]["mean_steps"], rows[1]["success_low"], rows[2]["success_low"]) == (4, None, 0.5)
