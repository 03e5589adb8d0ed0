"""`anchorage env …` as a user types it: make an environment, serve it, check it, and mistakes in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from env_servers.launch import start_server
from tests.processes import ROOT

ANCHORAGE = [sys.executable, "-m", "anchorage.cli.main", "env"]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*ANCHORAGE, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_new_serve_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = run(tmp_path, "new", "rock_paper")
    assert (made.returncode, made.stderr) == (0, "")
    assert "anchorage env serve rock_paper.environment:RockPaper" in made.stdout
    monkeypatch.chdir(tmp_path / "rock_paper")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    ready = tmp_path / "ready"
    serve = [*ANCHORAGE, "serve", "rock_paper.environment:RockPaper", "--port", "0", "--workers", "2"]
    with start_server([*serve, "--ready-file", str(ready)], ready) as server:
        checked = run(tmp_path, "check", server.url, "--seconds", "0.1", "--tasks", "2", "--steps", "5")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert checked.stdout.rstrip().endswith("fit for training")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("serve", "nothing"), "no environment is called 'nothing'"),
        (("serve", "alfworld", "--workers", "0"), "invalid option: workers: "),
        (("serve", "alfworld", "--workers", "4", "--max-sessions", "2"), "max_sessions must be at least workers"),
        (("serve", "alfworld", "--host", "0.0.0.0", "--workers", "2"), "needs a token"),
        (("check", "ftp://x"), "no address of an environment server"),
        (("new", "class"), "choose another"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: tuple[str, ...], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ANCHORAGE_ENV_TOKEN", raising=False)
    done = run(tmp_path, *arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert text in line
