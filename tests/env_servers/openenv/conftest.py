"""Real OpenEnv releases, and servers of ours for their clients."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from env_servers.launch import ServerProcess, start_server
from tests.env_servers.launching import launch
from tests.env_servers.openenv.venvs import NoOpenEnv, python_with_openenv

FOLDER = Path(__file__).parent


def interpreter(release: str) -> str:
    try:
        return str(python_with_openenv(release))
    except NoOpenEnv as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def openenv_03() -> str:
    """Interpreter with OpenEnv 0.3."""
    return interpreter("0.3")


@pytest.fixture(scope="session")
def openenv_10() -> str:
    """Interpreter with OpenEnv 0.10."""
    return interpreter("0.10")


@pytest.fixture(scope="session", params=["0.3", "0.10"])
def openenv(request: pytest.FixtureRequest) -> str:
    """Interpreter with an OpenEnv: each of the two."""
    return interpreter(request.param)


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., ServerProcess]]:
    """Starts a server of ours for an environment; all stop with the module."""
    with ExitStack() as servers:

        def start(environment: str, *options: str) -> ServerProcess:
            return servers.enter_context(launch(tmp_path_factory.mktemp("server") / "ready", environment, *options))

        yield start


@pytest.fixture(scope="module")
def echo(openenv_10: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., ServerProcess]]:
    """Starts an echo server of the real OpenEnv."""
    with ExitStack() as servers:

        def start(kind: str, *options: str) -> ServerProcess:
            ready = tmp_path_factory.mktemp("echo") / "ready"
            command = [openenv_10, str(FOLDER / "echo_server.py"), kind, "--ready-file", str(ready), *options]
            return servers.enter_context(start_server(command, ready, timeout_s=120))

        yield start


def run_under(python: str, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script of this folder under another interpreter."""
    return subprocess.run(
        [python, str(FOLDER / script), *arguments], capture_output=True, text=True, timeout=120, check=False
    )
