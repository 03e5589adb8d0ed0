"""ALFWorld on the official engine: every session plays in a worker process of its own.

Invariants
- The games are the same documents, and the observations the same texts, as with the native engine.
- Every answer of a worker is bounded in time; one that is late, dies or fails is ended and ends its session with
  `EngineFailure`. Workers end with this process.
- Idle workers are kept for the next sessions, a bounded number of them.
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
    raise ImportError("TextWorld is missing: pip install 'anchorage-rl[textworld]', which needs a C++ compiler")

START_LIMIT_S = 120.0
STEP_LIMIT_S = 30.0
IDLE_WORKERS = 8


class EngineFailure(RuntimeError):
    """The worker process died, did not answer in time, or failed on a command."""


class Worker:
    """A process that runs the official engine. Used by one thread at a time."""

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

    def ask(self, request: Mapping[str, object], limit_s: float) -> dict[str, Any]:
        """The worker's answer; without one in `limit_s` seconds the process is ended. Raises EngineFailure."""
        late = threading.Event()

        def stop() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(limit_s, stop)
        timer.start()
        try:
            line = self._exchange(json.dumps(request))
        finally:
            timer.cancel()
        if line.endswith("\n"):
            answer: dict[str, Any] = json.loads(line)
            return answer
        code = self.end()
        if late.is_set():
            raise EngineFailure(f"the TextWorld process gave no answer in {limit_s:g} s and was stopped")
        raise EngineFailure(f"the TextWorld process died (exit code {code}); its own message is in the server's log")

    def end(self) -> int:
        """End the process and answer its exit code."""
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
            raise AssertionError("the worker was started without pipes")
        try:
            stdin.write(request + "\n")
            stdin.flush()
            return stdout.readline()
        except OSError:
            return ""


class WorkerPool:
    """Keeps up to `idle` workers for the next session. Thread-safe."""

    def __init__(self, idle: int) -> None:
        self._limit = idle
        self._idle: list[Worker] = []
        self._lock = threading.Lock()

    def take(self) -> Worker:
        """An idle worker, or a new one."""
        with self._lock:
            while self._idle:
                worker = self._idle.pop()
                if worker.alive:
                    return worker
                worker.end()
        return Worker()

    def give_back(self, worker: Worker) -> None:
        with self._lock:
            if len(self._idle) < self._limit:
                self._idle.append(worker)
                return
        worker.end()

    def close(self) -> None:
        """End the idle workers."""
        with self._lock:
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.end()


@functools.cache
def worker_pool() -> WorkerPool:
    """The idle workers of this process."""
    pool = WorkerPool(IDLE_WORKERS)
    atexit.register(pool.close)
    return pool


class TextWorldPlay:
    """One game in a worker, until `close`.

    Raises:
        BrokenTask: the engine cannot load the document.
        EngineFailure: the worker died or was too slow; so does `step`.
    """

    def __init__(self, document: Mapping[str, object], pool: WorkerPool) -> None:
        self._pool = pool
        self._worker: Worker | None = pool.take()
        answer = self._worker.ask({"document": document}, START_LIMIT_S)
        if "error" in answer:
            self._drop()
            raise BrokenTask(f"TextWorld cannot play this game: {answer['error']}")
        self.introduction = str(answer["text"])
        self._note(answer)

    @property
    def pid(self) -> int | None:
        """Process id of the worker; None after `close`."""
        return self._worker.pid if self._worker is not None else None

    def step(self, command: str) -> str:
        """Carry out one command and answer the engine's feedback."""
        if self._worker is None:
            raise EngineFailure("the TextWorld process of this game is gone")
        try:
            answer = self._worker.ask({"command": command}, STEP_LIMIT_S)
        except EngineFailure:
            self._worker = None
            raise
        if "error" in answer:
            self._drop()
            raise EngineFailure(f"TextWorld failed: {answer['error']}")
        self._note(answer)
        return str(answer["text"])

    def close(self) -> None:
        """Hand the worker back. May be called again."""
        worker, self._worker = self._worker, None
        if worker is not None:
            self._pool.give_back(worker)

    def _drop(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.end()

    def _note(self, answer: Mapping[str, Any]) -> None:
        self.admissible: list[str] = list(answer["admissible"])
        self.won = bool(answer["won"])
        self.digest = str(answer["digest"])


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
