"""The pictures of the documentation can be taken again by one command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.control.settings import ADMIN_TOKEN_VARIABLE
from tests import needs
from tests.browser.chromium import CHROMIUM
from tests.browser.screenshots import SHOTS
from tests.control_server import ADMIN, LIVE

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(CHROMIUM is None, reason=needs.CHROMIUM)
def test_every_picture_is_taken(url: str, tmp_path: Path) -> None:
    pytest.importorskip("playwright.sync_api", reason=needs.PLAYWRIGHT)
    command = [sys.executable, "-m", "tests.browser.screenshots", url, LIVE, "--out", str(tmp_path)]
    environment = {**os.environ, ADMIN_TOKEN_VARIABLE: ADMIN}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=250, stdout=subprocess.DEVNULL)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(sizes) == {f"dashboard-{name}.png" for name in SHOTS}
    assert min(sizes.values()) > 20_000  # an empty page is 5 kB


def test_the_documentation_shows_every_picture() -> None:
    text = (ROOT / "docs" / "dashboard.md").read_text()
    assert all(f"images/dashboard-{name}.png" in text for name in SHOTS)
    assert "python -m tests.browser.screenshots" in text
