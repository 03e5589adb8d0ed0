"""The notebook's cells run in their order, train for real, and leave the two pictures."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiers
from tests.processes import ROOT

NOTEBOOK = ROOT / "examples" / "notebook.ipynb"
PNG = b"\x89PNG\r\n"


def test_it_is_stored_without_outputs() -> None:
    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook["nbformat"] == 4
    cells = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["outputs"] for cell in code] == [[]] * len(code)
    assert "minutes" in "".join(cells[0]["source"])  # how long it takes


@tiers.long
@pytest.mark.timeout(1800)
def test_every_cell_runs_as_in_a_notebook(tmp_path: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in ("ALFWORLD_DATA", "REDIS_URL")}
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH", "")]))
    runner = ROOT / "tests" / "anchorage" / "page_runner.py"
    done = subprocess.run(
        [sys.executable, runner, NOTEBOOK],
        cwd=tmp_path,
        env=kept | {"MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^update (\d) of 4: success \d+%$", done.stdout, re.MULTILINE) == ["1", "2", "3", "4"]
    assert len(re.findall(r"^(?:won |lost) after +\d+ steps, advantage [+-]\d+\.\d\d$", done.stdout, re.MULTILINE)) == 8
    for picture in ("success.png", "anchor.png"):
        assert (tmp_path / "runs" / "notebook" / picture).read_bytes().startswith(PNG)
