"""ALFWorld on the official engine: every session has its own worker process.

Invariants
- Games and observation texts are the same as with the native engine.
- Every request to a worker has a timeout. A worker that times out, dies or fails is stopped, and its session ends with
  `EngineFailure`. Workers exit with this process.
- A bounded number of idle workers is kept for later sessions.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, ClassVar

from env_servers.alfworld.environment import AlfWorld, game_source
from env_servers.alfworld.problem import Goal, read_goal
from env_servers.environment import BrokenTask

if importlib.util.find_spec("textworld") is None:
    raise ImportError("TextWorld is not installed: pip install 'anchorage-rl[textworld]' (needs a C++ compiler)")

START_TIMEOUT_S = 120.0
STEP_TIMEOUT_S = 30.0
IDLE_WORKERS = 8


class EngineFailure(RuntimeError):
    """The worker process died, timed out, or failed on a command."""


class Worker:
    """A process that runs the official engine. Not thread-safe."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "env_servers.alfworld.textworld_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def request(self, request: Mapping[str, object], timeout_s: float) -> dict[str, Any]:
        """Send a request and return the response. Raises EngineFailure.

        A worker that does not respond in `timeout_s` seconds is killed.
        """
        timed_out = threading.Event()

        def kill() -> None:
            timed_out.set()
            self._process.kill()

        timer = threading.Timer(timeout_s, kill)
        timer.start()
        try:
            line = self._exchange(json.dumps(request))
        finally:
            timer.cancel()
        if line.endswith("\n"):
            response: dict[str, Any] = json.loads(line)
            return response
        code = self.stop()
        if timed_out.is_set():
            raise EngineFailure(f"the TextWorld process did not respond in {timeout_s:g} s and was stopped")
        raise EngineFailure(f"the TextWorld process died (exit code {code}); see the server's log for its message")

    def stop(self) -> int:
        """Kill the process and return its exit code."""
        self._process.kill()
        code = self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                if stream is not None:
                    stream.close()
        return code

    def _exchange(self, request: str) -> str:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise AssertionError("the worker has no pipes")
        try:
            stdin.write(request + "\n")
            stdin.flush()
            return stdout.readline()
        except OSError:
            return ""


class WorkerPool:
    """A pool that keeps up to `idle` workers for later sessions. Thread-safe."""

    def __init__(self, idle: int) -> None:
        self._limit = idle
        self._idle: list[Worker] = []
        self._lock = threading.Lock()

    def take(self) -> Worker:
        """Return an idle worker, or start a new one."""
        with self._lock:
            while self._idle:
                worker = self._idle.pop()
                if worker.alive:
                    return worker
                worker.stop()
        return Worker()

    def give_back(self, worker: Worker) -> None:
        """Keep the worker, or stop it if the pool is full."""
        with self._lock:
            if len(self._idle) < self._limit:
                self._idle.append(worker)
                return
        worker.stop()

    def close(self) -> None:
        """Stop the idle workers."""
        with self._lock:
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.stop()


@functools.cache
def worker_pool() -> WorkerPool:
    """Return the worker pool of this process."""
    pool = WorkerPool(IDLE_WORKERS)
    atexit.register(pool.close)
    return pool


class TextWorldPlay:
    """One game in a worker process, until `close`.

    Raises:
        BrokenTask: the engine cannot load the document.
        EngineFailure: the worker died or timed out; `step` raises it too.
    """

    def __init__(self, document: Mapping[str, object], pool: WorkerPool) -> None:
        self._pool = pool
        self._worker: Worker | None = pool.take()
        response = self._worker.request({"document": document}, START_TIMEOUT_S)
        if "error" in response:
            self._drop()
            raise BrokenTask(f"TextWorld cannot play this game: {response['error']}")
        self.introduction = str(response["text"])
        self._store(response)

    @property
    def pid(self) -> int | None:
        """Process id of the worker; None after `close`."""
        return self._worker.pid if self._worker is not None else None

    def step(self, command: str) -> str:
        """Execute one command and return the engine's feedback."""
        if self._worker is None:
            raise EngineFailure("the TextWorld process of this game is not running: reset the session")
        try:
            response = self._worker.request({"command": command}, STEP_TIMEOUT_S)
        except EngineFailure:
            self._worker = None
            raise
        if "error" in response:
            self._drop()
            raise EngineFailure(f"TextWorld failed: {response['error']}")
        self._store(response)
        return str(response["text"])

    def close(self) -> None:
        """Return the worker to the pool. Idempotent."""
        worker, self._worker = self._worker, None
        if worker is not None:
            self._pool.give_back(worker)

    def _drop(self) -> None:
        """Stop the worker instead of reusing it: after an error the engine's state is unknown."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.stop()

    def _store(self, response: Mapping[str, Any]) -> None:
        self.admissible: list[str] = list(response["admissible"])
        self.won = bool(response["won"])
        self.digest = str(response["digest"])


class TextWorldAlfWorld(AlfWorld):
    """One session of ALFWorld on the official engine."""

    blocking: ClassVar[bool] = True
    engine: ClassVar[str] = "textworld"

    __slots__ = ()

    def _start(self, split: str, index: int) -> tuple[TextWorldPlay, Goal, str]:
        self.close()
        document = game_source().document(split, index)
        goal, goal_text = read_goal(document)
        return TextWorldPlay(document, worker_pool()), goal, goal_text

    def close(self) -> None:
        if isinstance(self._play, TextWorldPlay):
            self._play.close()
