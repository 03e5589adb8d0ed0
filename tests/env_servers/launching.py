"""An environment server as a process of its own, for tests of whoever talks to one."""

from __future__ import annotations

import sys
from pathlib import Path

from env_servers.launch import ServerProcess, start_server

COUNTING = "tests.env_servers.counting:Counting"


def launch(ready: Path, environment: str = COUNTING, *options: str) -> ServerProcess:
    """A server on a free port, or on that of `options`; its URL and log go to `ready` and beside it. Stop it."""
    command = [sys.executable, "-m", "env_servers", environment, "--port", "0", "--ready-file", str(ready)]
    return start_server([*command, *options], ready)
