"""Groups in processes of their own: rows survive a crash and a hang, and nothing is left behind."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.gpu_check import child
from benchmarks.gpu_check.groups import GROUPS, Group
from benchmarks.gpu_check.rows import Row
from benchmarks.gpu_check.settings import Settings
from tests.waiting import until

CHECKS = "tests.benchmarks.gpu_check.misbehaving:CHECKS"


LIMIT_S = 600.0


def rows_of(folder: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """Rows of the group; once it hangs, the clock of the process that waits for it is beyond the limit."""
    log = folder / "group.log"
    (folder / "how").write_text(how)

    def clock(real: Callable[[], float] = time.monotonic) -> float:
        return real() + (LIMIT_S if how == "hang" and log.exists() and "the last line" in log.read_text() else 0)

    monkeypatch.setattr(child, "time", SimpleNamespace(monotonic=clock, sleep=time.sleep))
    rows: list[Row] = []
    settings = Settings(dry=True, model="tiny-64", folder=folder)
    child.run_apart(Group("misbehaves", LIMIT_S, CHECKS), settings, log, rows.append)
    return rows


def gone(pid: int) -> bool:
    """Whether the process has ended; a zombie, whose parent has ended too, counts."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize(
    ("how", "reason"),
    [("SIGSEGV", "killed by SIGSEGV: the last line"), ("hang", "did not end within 600 s; the last line")],
)
def test_a_crash_and_a_hang_are_one_failed_row_each(
    tmp_path: Path, how: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rows_of(tmp_path, how, monkeypatch) == [
        Row("before the error", 1, "measured"),
        Row("raises", None, "failed", "ValueError: a first line"),
        Row("after the error", 2, "measured"),
        Row("process", None, "failed", reason),
    ]
    left = int((tmp_path / "child").read_text())
    assert left != os.getpid()
    assert until(lambda: gone(left))


def test_every_group_has_checks_that_exist() -> None:
    root = Path(__file__).resolve().parents[3]
    for name, group in GROUPS.items():
        module, _, checks = group.checks.partition(":")
        text = root.joinpath(*module.split(".")).with_suffix(".py").read_text()
        assert re.search(rf"^(\w+, )*{checks}\b.* = ", text, re.MULTILINE), name
        assert group.limit_s > 0
