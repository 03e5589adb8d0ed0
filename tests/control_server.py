"""A control plane as a process of its own, for tests of what a client or a browser meets."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

START_S = 120.0
STOP_S = 30.0


@contextmanager
def serving(runs: Path, tokens: Mapping[str, str]) -> Iterator[str]:
    """Yields the URL of `anchorage control` over `runs`."""
    ready = runs.parent / "control.url"
    command = [sys.executable, "-m", "services.cli.main", "control", str(runs), "--port", "0"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ANCHORAGE_CONTROL_")}
    process = subprocess.Popen(
        [*command, "--ready-file", str(ready), "--requests-per-minute", "1000000"],
        env={**clean, **tokens},
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + START_S
        while not ready.exists():
            assert process.poll() is None, "the control plane ended at its start"
            assert time.monotonic() < deadline, "the control plane does not listen"
            time.sleep(0.05)
        yield ready.read_text()
    finally:
        process.terminate()
        code = process.wait(STOP_S)
    assert code == 0
