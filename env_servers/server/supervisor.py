"""The supervisor of a server's worker processes: starts them, replaces those that end, stops them when it stops.

Invariants
- The environment is loaded once, before the workers are forked, so they share its memory. The parent starts no thread
  and no event loop.
- A worker that ends is replaced by one with a new number. Workers that keep ending stop the server.
- No worker outlives the parent, however the parent ends.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import logging
import os
import select
import signal
import socket
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from env_servers.environment import Environment
from env_servers.errors import ServerError
from env_servers.server import uvicorn_server
from env_servers.server.app import create_app
from env_servers.server.settings import ServerSettings
from env_servers.server.sockets import announce, join, reserve, url_of
from env_servers.sessions.table import CLOSING_S
from env_servers.workers.place import WorkerPlace

logger = logging.getLogger(__name__)

STOPPING = {signal.SIGTERM, signal.SIGINT}
START_LIMIT_S = 60.0
STOP_LIMIT_S = uvicorn_server.GRACE_S + 2 * CLOSING_S + 1.0
YOUNG_S = 5.0
MOST_EARLY_ENDS = 5
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Child:
    """A running worker process.

    Attributes:
        pid: process id.
        number: number of the worker, from 1; never reused.
        share: maximum number of sessions that it may hold.
        started_at: `time.monotonic()` at its start.
    """

    pid: int
    number: int
    share: int
    started_at: float


def supervise(environment: type[Environment], settings: ServerSettings) -> None:
    """Run `settings.workers` processes until SIGTERM or SIGINT. Raises what `serve` raises."""
    create_app(environment, settings)  # loads the environment, so that its errors come before any process is forked
    with (
        reserve(settings) as reserved,
        tempfile.TemporaryDirectory(prefix="anchorage-env-") as folder,
        Signals() as signals,
    ):
        supervisor = Supervisor(environment, settings, reserved, Path(folder), signals)
        try:
            supervisor.start()
            supervisor.watch()
        finally:
            supervisor.stop()


class Signals:
    """SIGTERM, SIGINT and SIGCHLD as bytes in a pipe, whichever thread receives them."""

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._read, self._write = os.pipe()

    def __enter__(self) -> Signals:
        os.set_blocking(self._write, False)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in (*STOPPING, signal.SIGCHLD):
            self._before[number] = signal.signal(number, lambda *_: None)
        return self

    def __exit__(self, *_: object) -> None:
        self.reset()
        os.close(self._read)
        os.close(self._write)

    def reset(self) -> None:
        """Restore the previous handlers, as a forked process must."""
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wait(self, limit_s: float | None = None) -> set[int]:
        """Wait for a signal and return all that came. `limit_s`: seconds to wait; None: no limit."""
        readable, _, _ = select.select([self._read], [], [], limit_s)
        return set(os.read(self._read, 4096)) if readable else set()


class Supervisor:
    """Starts, watches and stops the workers of one server."""

    def __init__(
        self,
        environment: type[Environment],
        settings: ServerSettings,
        reserved: socket.socket,
        folder: Path,
        signals: Signals,
    ) -> None:
        self._environment = environment
        self._settings = settings
        self._reserved = reserved
        self._folder = folder
        self._signals = signals
        self._children: dict[int, Child] = {}
        self._started = 0
        self._early_ends = 0

    def start(self) -> None:
        """Start the workers and wait until all of them accept connections."""
        # Frozen objects are never collected, so a collection in a worker does not copy the pages it shares.
        gc.collect()
        gc.freeze()
        workers, sessions = self._settings.workers, self._settings.max_sessions
        shares = [sessions // workers + (place < sessions % workers) for place in range(workers)]
        self._wait_for([self._spawn(share) for share in shares])
        url = url_of(self._reserved)
        if self._settings.ready_file is not None:
            announce(self._settings.ready_file, url)
        logger.info("serving %s at %s with %d worker processes", self._environment.name, url, workers)

    def watch(self) -> None:
        """Replace workers that end, until a signal asks to stop. Raises ServerError if they keep ending."""
        while not self._signals.wait() & STOPPING:
            for child in self._reap():
                self._record_end(child)
                os.close(self._spawn(child.share))

    def stop(self) -> None:
        """Stop all workers: SIGTERM, then SIGKILL after `STOP_LIMIT_S`."""
        for pid in self._children:
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_LIMIT_S
        while self._children and time.monotonic() < deadline:
            self._signals.wait(0.1)
            self._reap()
        for pid in self._children:
            logger.warning("worker process %d did not stop within %g s: killing it", pid, STOP_LIMIT_S)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def _spawn(self, share: int) -> int:
        """Fork a worker; returns the end of a pipe that receives a byte once the worker accepts connections."""
        self._started += 1
        number = self._started
        ready, tell = os.pipe()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            os.close(ready)
            self._run_worker(number, share, tell, parent)
        os.close(tell)
        self._children[pid] = Child(pid, number, share, time.monotonic())
        return ready

    def _run_worker(self, number: int, share: int, tell: int, parent: int) -> None:
        code = 1
        try:
            _die_with(parent)
            self._signals.reset()
            settings = self._settings.model_copy(update={"max_sessions": share})
            place = WorkerPlace(number, self._folder, self._settings.max_sessions)
            with join(settings, self._reserved) as listener:
                uvicorn_server.run(
                    create_app(self._environment, settings, place), listener, settings, lambda: _write_byte(tell)
                )
            code = 0
        except ServerError as error:
            logger.error("worker %d cannot start: %s", number, error)
        except BaseException:
            logger.exception("worker %d failed", number)
        finally:
            atexit._run_exitfuncs()
            logging.shutdown()
            os._exit(code)

    def _wait_for(self, pipes: Sequence[int]) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        try:
            for pipe in pipes:
                readable, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
                if not readable or not os.read(pipe, 1):
                    raise ServerError("a worker process did not start: see the log for its error")
        finally:
            for pipe in pipes:
                os.close(pipe)

    def _reap(self) -> list[Child]:
        """The workers that have ended since the last call."""
        ended = []
        for pid in list(self._children):
            with suppress(ChildProcessError):
                done, status = os.waitpid(pid, os.WNOHANG)
                if not done:
                    continue
                logger.info(
                    "worker %d ended with exit code %d", self._children[pid].number, os.waitstatus_to_exitcode(status)
                )
            ended.append(self._children.pop(pid))
        return ended

    def _record_end(self, child: Child) -> None:
        """Remove a worker's socket. Raises ServerError after `MOST_EARLY_ENDS` early ends in a row."""
        with suppress(FileNotFoundError):
            (self._folder / str(child.number)).unlink()
        young = time.monotonic() - child.started_at < YOUNG_S
        self._early_ends = self._early_ends + 1 if young else 0
        if self._early_ends >= MOST_EARLY_ENDS:
            raise ServerError("worker processes keep ending right after their start: see the log for their errors")
        logger.warning("worker %d ended, its sessions are lost: starting a replacement", child.number)


def _die_with(parent: int) -> None:
    """Let the kernel kill this process when its parent ends."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != parent:
        raise ServerError("the parent process has ended")


def _write_byte(pipe: int) -> None:
    """Tell the parent that connections are accepted. It does not listen for a replacement."""
    with suppress(BrokenPipeError):
        os.write(pipe, b"1")
    os.close(pipe)
