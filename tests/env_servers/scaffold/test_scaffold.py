"""A new project works as it is: its own tests pass, it can be served and checked, its Dockerfile names what it has."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from env_servers.launch import start_server
from env_servers.scaffold.__main__ import main
from tests.processes import ROOT


@pytest.fixture
def project(tmp_path: Path) -> Path:
    assert main(["rock_paper", "--in", str(tmp_path)]) == 0
    return tmp_path / "rock_paper"


def environment_of(project: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_its_own_tests_pass(project: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        command, cwd=project, env=environment_of(project), capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "21 passed" in done.stdout


def test_everything_is_renamed(project: Path) -> None:
    files = sorted(str(path.relative_to(project)) for path in project.rglob("*") if path.is_file())
    assert files == [
        "Dockerfile",
        "README.md",
        "pyproject.toml",
        "rock_paper/__init__.py",
        "rock_paper/environment.py",
        "tests/test_environment.py",
    ]
    whole = "".join(path.read_text() for path in project.rglob("*") if path.is_file())
    assert "my_environment" not in whole
    assert "class RockPaper(Environment)" in whole


def test_the_image_would_serve_it(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dockerfile = (project / "Dockerfile").read_text()
    found = re.search(r"^CMD (\[.*\])$", dockerfile, re.MULTILINE)
    assert found is not None
    python, *arguments = json.loads(found[1])
    assert python == "python"
    arguments[arguments.index("--port") + 1] = "0"
    monkeypatch.setenv("ANCHORAGE_ENV_TOKEN", "right")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(project)
    ready = tmp_path / "ready"
    with start_server([sys.executable, *arguments, "--ready-file", str(ready)], ready) as server:
        assert httpx.get(f"{server.url}/health").json() == {"status": "healthy"}
        assert httpx.get(f"{server.url}/info").status_code == 401
        info = httpx.get(f"{server.url}/info", headers={"authorization": "Bearer right"}).json()
    assert (info["name"], info["splits"]) == ("rock_paper", {"train": 1000, "test": 100})


@pytest.mark.parametrize("name", ["", "Rock", "rock-paper", "../x", "1st", "class", "json", "env_servers", "_", "é"])
def test_names_that_cannot_be(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--in", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("anchorage: ")
    assert "choose another" in line or "invalid package name" in line
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rock_paper").mkdir()
    assert main(["rock_paper", "--in", str(tmp_path)]) == 2
    assert "folder already exists" in capsys.readouterr().err
    assert list((tmp_path / "rock_paper").iterdir()) == []
