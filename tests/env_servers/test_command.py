"""`anchorage env …` as a user types it: make an environment, serve it, check it, and mistakes in one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from env_servers.errors import ServerError
from env_servers.launch import start_server
from env_servers.registry import load_environment
from tests.processes import ROOT
from tests.waiting import until

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
        (("serve", "nothing"), "unknown environment 'nothing'"),
        (("serve", "alfworld", "--workers", "0"), "invalid option: workers: "),
        (("serve", "alfworld", "--workers", "4", "--max-sessions", "2"), "max_sessions must be >= workers"),
        (("serve", "alfworld", "--host", "0.0.0.0", "--workers", "2"), "requires a token"),
        (("check", "ftp://x"), "not the address of an environment server"),
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


CLASHING = """
from collections.abc import Mapping

from actors.rules import sizes
from env_servers.environment import Environment, Observation
from services import title


class Env(Environment):
    name = title

    @classmethod
    def splits(cls) -> Mapping[str, int]:
        return sizes()

    def reset(self, split: str, index: int, *, expert: bool = False) -> Observation:
        return Observation("start")

    def step(self, action: str) -> Observation:
        return Observation("end", reward=1.0, terminated=True)
"""


def test_an_environment_whose_packages_are_called_as_ours_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file, text in (
        ("services/__init__.py", "title = 'clashing'"),
        ("actors/__init__.py", ""),
        ("actors/rules.py", "def sizes():\n    return {'train': 7}"),
        ("mine.py", CLASHING),
    ):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    ready = tmp_path / "ready"
    # -P: as with the console script, the working directory is not on the path from the start.
    served = [sys.executable, "-P", "-m", "anchorage.cli.main", "env", "serve", "mine:Env", "--port", "0"]
    with start_server([*served, "--ready-file", str(ready)], ready) as server:
        checked = run(ROOT, "check", server.url, "--seconds", "0.1", "--tasks", "2", "--steps", "1")
    assert "clashing 1 at " in checked.stdout, checked.stdout + checked.stderr
    assert "(train 7)" in checked.stdout


def test_ctrl_c_ends_a_server_as_it_ends_one_of_the_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    codes = []
    for number, start in enumerate((["env_servers"], ["anchorage.cli.main", "env", "serve"])):
        ready = tmp_path / str(number)
        command = [sys.executable, "-m", *start, "alfworld", "--port", "0", "--ready-file", str(ready)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
            until(ready.exists, 60)
            server.send_signal(signal.SIGINT)
            _, messages = server.communicate(timeout=60)
        assert "Traceback" not in messages
        codes.append(server.returncode)
    assert codes == [0, 0]


def test_in_a_process_of_ours_a_package_of_our_name_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "learner").mkdir()
    (tmp_path / "learner" / "rules.py").touch()
    (tmp_path / "clashing_environment.py").write_text("import learner.rules")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(ROOT))
    with pytest.raises(ServerError, match=r"its package 'learner' in .* has the name of one of Anchorage's"):
        load_environment("clashing_environment:Env")
