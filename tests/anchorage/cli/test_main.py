"""The command line itself: its version, and what it says where the packages for training are missing."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from anchorage.cli.main import DISTRIBUTION
from tests.processes import ROOT

WITHOUT_TRAINING = """
import sys
from anchorage.cli import main

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in main.TRAINING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
main.main(sys.argv[1:])
"""


def run(folder: Path, *python: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *python],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_version(tmp_path: Path) -> None:
    done = run(tmp_path, "-m", "anchorage.cli.main", "--version")
    try:
        version = metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        version = "(a checkout that is not installed)"
    assert (done.returncode, done.stdout) == (0, f"anchorage {version}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "demo"),
        ("demo",),
        ("eval", "demo", "--policy", "models/starter"),
        ("warmstart", "out"),
        ("model", "check", "models/starter"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_without_the_extra_for_training_one_line_says_what_to_install(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    done = run(tmp_path, "-c", WITHOUT_TRAINING, *arguments)
    assert done.returncode == 1, done.stdout + done.stderr
    [line] = done.stderr.splitlines()
    assert line.endswith("is not installed, which this command needs: pip install 'anchorage-rl[train]'")


def test_commands_that_do_not_train_need_no_extra(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    done = run(tmp_path, "-c", WITHOUT_TRAINING, "status", "runs/none")
    assert "no run" in done.stderr
    assert run(tmp_path, "-c", WITHOUT_TRAINING, "--help").returncode == 0
