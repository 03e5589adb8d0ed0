"""docs/python-api.md is true: its code runs, with a real training of two updates, and prints nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import anchorage
from tests.anchorage.page_runner import blocks
from tests.processes import ROOT

PAGE = ROOT / "docs" / "python-api.md"


@pytest.mark.timeout(1800)
def test_every_block_of_the_page_runs_silently_off_the_main_thread_and_under_a_loop(tmp_path: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in ("ALFWORLD_DATA", "REDIS_URL")}
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH", "")]))
    runner = ROOT / "tests" / "anchorage" / "page_runner.py"
    done = subprocess.run(
        [sys.executable, runner, PAGE], cwd=tmp_path, env=kept, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")
    assert (tmp_path / "runs" / "first" / "checkpoints" / "000002").is_dir()


def test_the_page_names_all_that_the_package_offers() -> None:
    text = PAGE.read_text()
    assert [name for name in anchorage.__all__ if name not in text] == ["__version__"]
    assert len(blocks(PAGE)) > 10
