"""A folder with a finished and a live run, and the API over it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr
from starlette.testclient import TestClient

from services.buffer import Buffer
from services.control.app import create_app
from services.control.settings import ControlSettings
from tests.control_runs import make_finished, make_live
from tests.control_server import ADMIN, READ, buffer, folder, url

__all__ = ["buffer", "folder", "url"]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    make_finished(tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture
def live(runs: Path, run_name: str, redis_url: str) -> Iterator[Buffer]:
    """The buffer of the live run `run_name`."""
    _, buffer = make_live(runs, run_name, redis_url)
    yield buffer
    buffer.close()


@pytest.fixture
def settings(runs: Path) -> ControlSettings:
    return ControlSettings(
        runs=runs, read_token=SecretStr(READ), admin_token=SecretStr(ADMIN), requests_per_minute=10_000
    )


@pytest.fixture
def api(settings: ControlSettings) -> Iterator[TestClient]:
    """A client that bears the admin token."""
    with TestClient(create_app(settings), headers={"Authorization": f"Bearer {ADMIN}"}) as client:
        yield client
