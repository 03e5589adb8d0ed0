"""Runs `anchorage` as a user would, in a process of its own, and finds every process that a run has started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from services.process import ReservedPort

ROOT = Path(__file__).resolve().parents[1]
MARK = "ANCHORAGE_TEST_MARK"


def free_port() -> int:
    """A port of the loopback that nobody has at the moment; for servers that a test starts at once."""
    with ReservedPort("127.0.0.1") as port:
        return port.number


class Command:
    """A started `anchorage` command. Its processes carry a mark in their environment."""

    def __init__(self, arguments: list[str], environment: Mapping[str, str] | None = None) -> None:
        self.mark = uuid.uuid4().hex
        inherited = {name: value for name, value in os.environ.items() if name not in ("ALFWORLD_DATA", "REDIS_URL")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "anchorage.cli.main", *arguments],
            cwd=ROOT,
            env={**inherited, **(environment or {}), MARK: self.mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        for process in [*self.processes(), psutil.Process()][:-1]:
            process.kill()
        self._process.communicate()

    def finish(self, timeout_s: float) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        out, err = self._process.communicate(timeout=timeout_s)
        return self._process.returncode, out, err

    def kill(self) -> None:
        """`kill -9` of the command's own process."""
        self._process.kill()
        self._process.wait()

    def stop(self, number: signal.Signals) -> None:
        """Ask the command to end: SIGINT as Ctrl-C does, SIGTERM as a supervisor does."""
        self._process.send_signal(number)

    def processes(self) -> list[psutil.Process]:
        """All living processes that carry the mark, the command's own included."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self.mark:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def titled(self, title: str) -> list[psutil.Process]:
        """The processes whose command line begins with `title`, as Ray names its actors."""
        return [p for p in self.processes() if " ".join(p.cmdline()).startswith(title)]

    def wait_for(self, condition: Callable[[], bool], timeout_s: float) -> None:
        """Wait for a condition while the command runs; fails with the command's output when it ends first."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if self._process.poll() is not None:
                out, err = self._process.communicate()
                raise AssertionError(f"the command ended early ({self._process.returncode}):\n{out}\n{err}")
            assert time.monotonic() < deadline, "waited too long"
            time.sleep(0.2)

    def wait_until_gone(self, timeout_s: float = 90.0) -> None:
        """Wait until none of its processes is left.

        The limit is beyond the 60 s for which Ray's own agents try to tell a dead GCS that their raylet is dead.
        """
        deadline = time.monotonic() + timeout_s
        while left := self.processes():
            assert time.monotonic() < deadline, f"left running: {[' '.join(p.cmdline())[:80] for p in left]}"
            time.sleep(0.2)
