"""The live state of a run, from its Redis: read at most twice a second, however many clients there are.

Invariants
- Its size grows with the number of actors, not with that of groups or tickets.
- If Redis does not respond or its data cannot be read, the run is not live; that is no error. It is tried again after
  `RETRY_S`.
- Every read has a short time limit.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.buffer import Buffer, BufferStats, Heartbeat, ServerStats
from services.buffer.commands import Command
from services.config.tree import Config
from services.errors import BufferDamaged, RedisUnavailable
from services.run_folder import redis_url
from services.schemas import TRAIN_STREAM

FRESH_S = 0.5
RETRY_S = 3.0
TIMEOUT_S = 2.0
PATIENCE_S = 0.2
LISTED_GROUPS = 100
"""Number of complete and of cancelled groups that are listed; `Snapshot.stats` counts all."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of a run in Redis at one moment.

    Attributes:
        state: `running`, `paused` or `stopping`.
        stats: counts of tickets and groups, and the size of the buffer.
        actors: the last heartbeat of each live actor, by name.
        complete: the first `LISTED_GROUPS` complete training groups.
        cancelled: some `LISTED_GROUPS` cancelled training groups and the reasons.
        commands: requested actions, oldest first.
        wanted_actors: requested number of rollout actors; None: not requested.
    """

    state: str
    stats: BufferStats
    actors: dict[str, Heartbeat]
    complete: list[int]
    cancelled: dict[int, str]
    commands: list[Command]
    wanted_actors: int | None


class Live:
    """The connection to one run's Redis. Thread-safe."""

    def __init__(self, folder: Path, config: Config) -> None:
        self._folder = folder
        self._config = config
        self._lock = threading.Lock()
        self._buffer: Buffer | None = None
        self._snapshot: Snapshot | None = None
        self._taken = -RETRY_S
        self._damage: str | None = None

    @property
    def damage(self) -> str | None:
        """Why the run's data cannot be read although its Redis responds; None if they can."""
        return self._damage

    def snapshot(self) -> Snapshot | None:
        """The state of the run, at most `FRESH_S` old; None while the run is not live."""
        with self._lock:
            age = time.monotonic() - self._taken
            if age > (FRESH_S if self._snapshot is not None else RETRY_S):
                self._snapshot = self._query(_look)
                self._taken = time.monotonic()
            return self._snapshot

    def buffer(self) -> Buffer | None:
        """The run's buffer; None while it is not live."""
        with self._lock:
            found: Buffer | None = self._query(lambda buffer: buffer if buffer.state() else None)
            return found

    def server(self) -> ServerStats | None:
        """Statistics of the Redis server; None while the run is not live, or if Redis does not permit INFO."""
        buffer = self.buffer()
        try:
            return None if buffer is None else buffer.server()
        except RedisUnavailable as error:
            log.info("run %s: Redis INFO failed: %s", self._folder.name, error)
            return None

    def refresh(self) -> None:
        """Read Redis again at the next call of `snapshot`."""
        with self._lock:
            self._taken = -RETRY_S

    def close(self) -> None:
        with self._lock:
            self._drop()

    def _query(self, question: Callable[[Buffer], Any]) -> Any:
        try:
            buffer = self._connected()
            answer = None if buffer is None else question(buffer)
            self._damage = None
            return answer
        except RedisUnavailable as error:
            log.info("run %s is not live: %s", self._folder.name, error)
            self._damage = str(error) if isinstance(error, BufferDamaged) else None
            self._drop()
            return None

    def _connected(self) -> Buffer | None:
        if self._buffer is None:
            url = redis_url(self._folder, self._config)
            if url is None:
                return None
            quick = self._config.buffer.model_copy(update={"timeout_s": TIMEOUT_S, "reconnect_s": PATIENCE_S})
            self._buffer = Buffer.connect(url, self._config.run.name, quick)
        return self._buffer

    def _drop(self) -> None:
        if self._buffer is not None:
            with contextlib.suppress(OSError):
                self._buffer.close()
        self._buffer = None


def _look(buffer: Buffer) -> Snapshot | None:
    state = buffer.state()
    if not state:
        return None  # this Redis does not know the run
    return Snapshot(
        state=state,
        stats=buffer.stats(),
        actors=buffer.heartbeats(),
        complete=buffer.complete(TRAIN_STREAM, LISTED_GROUPS),
        cancelled=buffer.cancelled(TRAIN_STREAM, LISTED_GROUPS),
        commands=buffer.commands.all(),
        wanted_actors=buffer.desired_actors(),
    )
