"""A control plane as a process of its own over a finished and a live run, for tests of what clients and browsers meet.

A `conftest.py` that imports the fixtures `folder`, `buffer` and `url` gives them to the tests beside it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from services.buffer import Buffer
from services.control.settings import ADMIN_TOKEN_VARIABLE, READ_TOKEN_VARIABLE
from tests.control_runs import make_finished, make_live

READ, ADMIN, LIVE = "read-token-0123456789", "admin-token-0123456789", "watched"
"""The tokens, and the name of the live run; the finished one is called `finished`."""

START_S = 120.0
STOP_S = 30.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs' folder."""
    return tmp_path_factory.mktemp("served") / "runs"


@pytest.fixture(scope="module")
def buffer(folder: Path, redis_url: str) -> Iterator[Buffer]:
    """The live run's."""
    make_finished(folder)
    _, buffer = make_live(folder, LIVE, redis_url)
    yield buffer
    buffer.close()


@pytest.fixture(scope="module")
def url(folder: Path, buffer: Buffer) -> Iterator[str]:
    """Of the control plane."""
    with serving(folder) as url:
        yield url


@contextmanager
def serving(runs: Path, port: int = 0) -> Iterator[str]:
    """Yields the URL of `anchorage control` over `runs`; at `port` where one is given."""
    ready = runs.parent / "control.url"
    command = [sys.executable, "-m", "anchorage.cli.main", "control", str(runs), "--port", str(port)]
    ready.unlink(missing_ok=True)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ANCHORAGE_CONTROL_")}
    process = subprocess.Popen(
        [*command, "--ready-file", str(ready), "--requests-per-minute", "1000000"],
        env={**clean, READ_TOKEN_VARIABLE: READ, ADMIN_TOKEN_VARIABLE: ADMIN},
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
