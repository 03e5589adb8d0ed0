"""Starts an environment server as a child process, for a run on one machine.

Invariants
- The child does not outlive its parent, however the parent ends: the kernel kills it when the thread that started it
  ends. So start servers from a thread that lives as long as they are needed, such as the main thread.
- The child does not receive the terminal's Ctrl-C (it has a session of its own); its parent stops it.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from env_servers.errors import ServerError

logger = logging.getLogger(__name__)

POLL_S = 0.02
LOG_TAIL_BYTES = 8192

# PR_SET_PDEATHSIG is 1; it survives exec. Unlike `preexec_fn`, this cannot deadlock in a process with threads.
_BOUND_TO_PARENT = """
import ctypes, os, signal, sys
if ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL, 0, 0, 0) != 0:
    sys.exit("prctl: " + os.strerror(ctypes.get_errno()))
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent process has ended")
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"{sys.argv[2]}: {error.strerror}")
"""


class ServerProcess:
    """A running server. Use it as a context manager, or call `stop`.

    Attributes:
        url: address of the server.
        log_file: file with the server's output.
    """

    def __init__(self, process: subprocess.Popen[bytes], url: str, log_file: Path) -> None:
        self._process = process
        self.url = url
        self.log_file = log_file

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def stop(self, grace_s: float = 10.0) -> None:
        """Send SIGTERM, and SIGKILL if the server does not end within `grace_s` seconds."""
        _stop(self._process, grace_s)

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def start_server(
    command: Sequence[str], ready_file: Path, timeout_s: float = 60.0, log_file: Path | None = None
) -> ServerProcess:
    """Start a server and wait until it accepts connections. Blocks.

    Args:
        command: command line of the server, which must write its URL to `ready_file` once it accepts connections.
        ready_file: removed first, so that an old file is not mistaken for the new server's.
        timeout_s: time limit of the start, in seconds.
        log_file: the server's output is appended to it; none: `ready_file` with the suffix `.log`.

    Raises:
        ServerError: the server ended, or did not accept connections in time. The message quotes its last output line.

    Example:
        command = [sys.executable, "-m", "env_servers", "alfworld", "--port", "0", "--ready-file", "/tmp/alfworld.url"]
        with start_server(command, Path("/tmp/alfworld.url")) as server:
            client = open_client(server.url)
    """
    log_file = log_file or ready_file.with_suffix(".log")
    ready_file.unlink(missing_ok=True)
    bound = [sys.executable, "-I", "-S", "-c", _BOUND_TO_PARENT, str(os.getpid()), *command]
    with log_file.open("ab") as log:
        process = subprocess.Popen(
            bound, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        url = _wait_for(process, ready_file, log_file, timeout_s)
    except BaseException:
        _stop(process, grace_s=1.0)
        raise
    logger.info("environment server started: pid %d, %s, log in %s", process.pid, url, log_file)
    return ServerProcess(process, url, log_file)


def _wait_for(process: subprocess.Popen[bytes], ready_file: Path, log_file: Path, timeout_s: float) -> str:
    deadline = time.monotonic() + timeout_s
    while not ready_file.exists():
        code = process.poll()
        if code is not None:
            raise ServerError(
                f"the environment server ended during its start (exit code {code}): {_last_line(log_file)}"
            )
        if time.monotonic() > deadline:
            raise ServerError(f"the environment server did not start within {timeout_s:g} s: {_last_line(log_file)}")
        time.sleep(POLL_S)
    return ready_file.read_text().strip()


def _stop(process: subprocess.Popen[bytes], grace_s: float) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(grace_s)
    except subprocess.TimeoutExpired:
        logger.warning("environment server %d did not stop within %g s: killing it", process.pid, grace_s)
        process.kill()
        process.wait()


def _last_line(log_file: Path) -> str:
    lines = log_file.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"no output in {log_file}"
