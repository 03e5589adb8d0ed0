"""A group's process, at both ends: `python -m benchmarks.gpu_check.child CHECKS FILE`.

Invariants
- FILE gets a line of JSON for each row as soon as it is known: rows before a crash or the time limit are kept.
- Nothing that the group started is left: its process group is killed at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from benchmarks.gpu_check.groups import Group, run
from benchmarks.gpu_check.rows import Row, failed
from benchmarks.gpu_check.settings import Settings
from services import process

SETTINGS = "ANCHORAGE_GPU_CHECK"
TAIL_BYTES = 2**14
POLL_S = 0.1


def run_apart(group: Group, settings: Settings, log: Path, report: Callable[[Row], None]) -> None:
    """Run a group in a process of its own. A crash, and a hang beyond its limit, are a failed row each.

    Args:
        group: which one.
        settings: of the checks.
        log: file for what the group prints.
        report: gets each row.
    """
    rows = log.with_suffix(".rows")
    rows.touch()
    variables = group.environment | {SETTINGS: settings.to_json()}
    with log.open("wb") as output:
        child = process.start(
            [sys.executable, "-m", "benchmarks.gpu_check.child", group.checks, str(rows)],
            environment=variables,
            output=output,
        )
        with rows.open() as arriving:
            code = _follow(child, time.monotonic() + group.limit_s, lambda: _pass_on(arriving, report))
            _pass_on(arriving, report)
    if code is None:
        report(failed("process", f"did not end within {group.limit_s:g} s; {_last_line(log)}"))
    elif code != 0:
        report(failed("process", f"{_ended(code)}: {_last_line(log)}"))


def _follow(child: subprocess.Popen[bytes], deadline: float, meanwhile: Callable[[], None]) -> int | None:
    """The exit code, None at the deadline; either way the whole process group is killed."""
    try:
        while child.poll() is None and time.monotonic() < deadline:
            meanwhile()
            time.sleep(POLL_S)
        return child.poll()
    finally:
        # It has a session of its own, and so a process group, which outlives it while a member does.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _pass_on(arriving: IO[str], report: Callable[[Row], None]) -> None:
    """Report the rows that have been written since the last call."""
    while True:
        place = arriving.tell()
        line = arriving.readline()
        if not line.endswith("\n"):
            arriving.seek(place)
            return
        report(Row(**json.loads(line)))


def _ended(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL_BYTES))
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "it printed nothing")


def main() -> None:
    """Run the checks that the arguments name."""
    checks, file = sys.argv[1:]
    settings = Settings.from_json(os.environ.pop(SETTINGS))
    with Path(file).open("a") as rows:

        def report(row: Row) -> None:
            rows.write(json.dumps(row.record()) + "\n")
            rows.flush()

        run(checks, settings, report)


if __name__ == "__main__":
    main()
