"""Verdicts, and what the JSON file tells: every figure, and nothing of who measured it."""

from __future__ import annotations

import getpass
import json
import math
import socket

import pytest

from benchmarks.gpu_check import report
from benchmarks.gpu_check.__main__ import main
from benchmarks.gpu_check.rows import Row, at_least, at_most, between, failed, measured, skipped


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        (at_most("x", 1.0, 1.0), "ok"),
        (at_most("x", 1.01, 1.0), "failed"),
        (at_most("x", math.nan, 1.0), "failed"),
        (at_least("x", 1.0, 1.0), "ok"),
        (at_least("x", 0.99, 1.0), "failed"),
        (at_least("x", math.nan, 1.0), "failed"),
        (between("x", 1.0, 0.9, 1.1), "ok"),
        (between("x", 1.2, 0.9, 1.1), "failed"),
        (between("x", 0.8, 0.9, 1.1), "failed"),
        (between("x", math.nan, 0.9, 1.1), "failed"),
    ],
)
def test_verdicts(row: Row, verdict: str) -> None:
    assert row.verdict == verdict
    assert row.reason


def test_the_file_has_every_row_and_does_not_name_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "gpu7-lab")
    monkeypatch.setattr(getpass, "getuser", lambda: "ann")
    card = "GPU-0a1b2c3d-1111-2222-3333-444455556666"
    told = f"cannot open /home/ann/.cache/x.so on gpu7-lab as ann at 10.1.2.3, card {card}"
    rows = [("a", failed("open", told)), ("a", measured("speed", math.nan)), ("b", skipped("p2p", "one card"))]
    text = report.document(report.facts(dry=True), rows, {"a": 1.25, "b": 0.0})
    found = json.loads(text)
    assert found["format"] == report.FORMAT
    assert found["verdicts"] == {"ok": 0, "failed": 1, "skipped": 1, "measured": 1}
    assert [(row["group"], row["name"], row["verdict"]) for row in found["rows"]] == [
        ("a", "open", "failed"),
        ("a", "speed", "measured"),
        ("b", "p2p", "skipped"),
    ]
    assert found["rows"][0]["reason"] == "cannot open PATH/x.so on HOST as USER at ADDRESS, card GPU-UUID"
    assert found["rows"][1]["value"] == "nan"
    assert {"date", "anchorage", "machine"} <= set(found)


def test_versions_and_units_are_not_taken_for_addresses_or_folders() -> None:
    for text in ("torch 2.13.0+cu130", "580.65.06", "GB/s", "tokens/s at 128", "127.0.0.1", "/dev/shm, GiB"):
        assert report.scrub(text) == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "/proc/nowhere/all.json"], "cannot write /proc/nowhere/all.json: No such file or directory"),
        (["--folder", "/nowhere"], "--folder=/nowhere: cannot write: No such file or directory"),
        (["--logs", "/dev/null/logs"], "--logs=/dev/null/logs: cannot write: "),
        (["--model", "0.6b"], "--model 0.6b: not a folder with a config.json, and no known size"),
    ],
)
def test_invalid_arguments_are_one_line_before_any_group_runs(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--dry", "--only", "packages", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"gpu-check: {message}")
    assert printed.err.count("\n") == 1
    assert printed.out == ""
