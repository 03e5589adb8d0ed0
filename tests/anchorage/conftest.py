"""Commands run in a folder like a checkout's, without the runs that a user's checkout may hold."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def bare_checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipes and models of this checkout, and no runs."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "models"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture(autouse=True)
def _in_bare_checkout(bare_checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`runs/demo`, which `make demo` leaves, must not change what a test of `configs/demo.yaml` sees."""
    monkeypatch.chdir(bare_checkout)
    monkeypatch.setenv(
        "PYTHONPATH", str(ROOT), prepend=os.pathsep
    )  # environments of the tests, in processes of their own
