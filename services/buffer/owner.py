"""Who runs a run: one process at a time owns its name in a Redis.

Invariants
- Whoever writes for a run (its learner and its actors) names the owner's token in every call; after another process has
  taken the name, such calls fail with RunTaken and change nothing.
- A name is taken from an owner that released it, from a process that is known to be dead (same machine, same process
  namespace), or from one that gave no sign of life for its whole lease. The taker measures that by its own monotonic
  clock, so no clock that is set can take a name from a live run.
- What another lineage left in Redis is deleted with the taking. A lineage is a run's folder from its start on: a new
  start has a new one, a resumed run has that of its folder, a copied folder has none.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import Field, TypeAdapter, ValidationError

from services.config.tree import LONGEST_LEASE_S
from services.errors import AnchorageError, RedisUnavailable, RunTaken

BEATS_A_LEASE = 8
CLOSING_S = 10.0
POLL_S = 0.1
PROMPT_S = 1.0
"""An answer of Redis that took longer says nothing of whether the owner was silent meanwhile."""
_LATEST = 1e11
"""Unix seconds that every platform can write as a date."""
_PROC = Path("/proc")
_DEAD = ("X", "Z")
_STOPPED = ("T", "t")
"""States of a process, as the kernel calls them; one that is stopped may be as good as dead."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Record:
    """Which process owns a run, and since when (Unix seconds).

    Attributes:
        host: its name. boot, namespace: of the machine's start and of the process namespace; pids are unique in both.
        started: when the process began, in ticks since the boot: pids are used again.
        lease_s: after so many seconds without a sign of life it may be replaced.
    """

    host: Annotated[str, Field(max_length=255, pattern=r"^[^\x00-\x1f\x7f]*$")]
    boot: str
    namespace: str
    pid: int
    started: int
    since: Annotated[float, Field(ge=0, le=_LATEST)]
    lease_s: Annotated[float, Field(gt=0, le=LONGEST_LEASE_S)]

    @classmethod
    def here(cls, lease_s: float) -> Record:
        """Of the calling process."""
        pid = os.getpid()
        _, started = _process(pid) or ("", 0)
        return cls(socket.gethostname(), _boot(), _namespace(), pid, started, time.time(), lease_s)

    def state(self) -> str | None:
        """The process's state as the kernel has it, `X` when it is gone; None where it cannot be seen from here."""
        if not self.boot or not self.namespace or (self.boot, self.namespace) != (_boot(), _namespace()):
            return None
        found = _process(self.pid)
        if found is None:
            return None if _is_hidden(self.pid) else "X"
        return found[0] if found[1] == self.started else "X"

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.since).astimezone()
        return f"{self.host} (process {self.pid}) since {since:%Y-%m-%d %H:%M:%S %Z}"


RECORD = TypeAdapter(Record)


@dataclass(frozen=True, slots=True)
class Owner:
    """The hold on a run's name: what every writing call shows. Plain data, so that actors can have it too."""

    token: str
    lineage: str
    record: str


@dataclass(frozen=True, slots=True)
class Found:
    """An owner as Redis has it; `record` is None where it cannot be read."""

    token: str
    beats: str
    released: bool
    record: Record | None


class Names(Protocol):
    """What taking a name needs of a `Buffer`."""

    def owner(self) -> Found | None: ...
    def take(self, seen: Found | None, unique: str, lineage: str, record: str) -> str | None: ...
    def beat(self) -> None: ...
    def release_owner(self) -> None: ...


def take(
    buffer: Names,
    run: str,
    lineage: str,
    lease_s: float,
    *,
    alone: bool = False,
    waiting: Callable[[str], object] = log.info,
) -> Owner:
    """Own the run's name. An owner that may be dead is watched for its lease; `waiting` is told so once.

    `alone`: nobody else can use this Redis, so whoever is named there is gone, or is the original of a copied folder.

    Raises:
        RunTaken: another process runs it.
    """
    record = RECORD.dump_json(Record.here(lease_s)).decode()
    unique = uuid.uuid4().hex
    watched: tuple[Found, float] | None = None
    told = False
    while True:
        asked = time.monotonic()
        found = buffer.owner()
        if time.monotonic() - asked > PROMPT_S:
            watched = None  # Redis was away: its owner could not show itself either
        if alone or found is None or _may_be_replaced(run, found, watched, lease_s):
            token = buffer.take(found, unique, lineage, record)
            if token is not None:
                return Owner(token, lineage, record)
            continue
        if watched is None and not told:
            told = True
            waiting(f"run {run} was not released by {found.record or 'its owner'}; waiting for a sign of life")
        if watched is None or watched[0] != found:
            watched = (found, time.monotonic())
        time.sleep(POLL_S)


def in_use(run: str, record: Record | None) -> str:
    """The line for whoever cannot have the run."""
    whom = f"by {record}" if record is not None else "by another process"
    return f"run {run} is in use {whom}; stop that one, or give this one another run.name or Redis"


def parse_found(answer: list[bytes] | None) -> Found | None:
    """The answer of `owner.lua`."""
    if not answer:
        return None
    token, beats, released, text = (part.decode(errors="replace") for part in answer)
    try:
        record = RECORD.validate_json(text)
    except ValidationError:
        record = None
    return Found(token, beats, bool(released), record)


class Ownership:
    """Keeps a taken name: shows a sign of life `BEATS_A_LEASE` times a lease, on a thread of its own."""

    def __init__(self, buffer: Names, lease_s: float) -> None:
        self._buffer = buffer
        self._every_s = lease_s / BEATS_A_LEASE
        self._ended = threading.Event()
        self._lost: RunTaken | None = None
        self._thread = threading.Thread(target=self._run, name="owner", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> bool:
        return self._lost is not None

    def check(self) -> None:
        """Raises RunTaken once another process has taken the name."""
        if self._lost is not None:
            raise self._lost

    def release(self) -> None:
        """Let go of the name. Whoever has taken it keeps it."""
        self._ended.set()
        self._thread.join(CLOSING_S)
        if self._thread.is_alive():
            log.warning("Redis is away: the run's name is not released, its lease will run out")
        elif self._lost is None:
            try:
                self._buffer.release_owner()
            except AnchorageError as error:
                log.warning("the run's name is not released, its lease will run out: %s", error)

    def _run(self) -> None:
        while not self._ended.wait(self._every_s):
            try:
                self._buffer.beat()
            except RunTaken as error:
                self._lost = error
                return
            except RedisUnavailable as error:
                log.warning("the hold on the run's name is not renewed: %s", error)


def _may_be_replaced(run: str, found: Found, watched: tuple[Found, float] | None, lease_s: float) -> bool:
    """Whether the owner is gone, as far as is known by now. RunTaken when it is alive."""
    if found.released:
        return True
    state = None if found.record is None else found.record.state()
    if state in _DEAD:
        return True
    beats = watched is not None and watched[0].token == found.token and watched[0].beats != found.beats
    if beats or (state is not None and state not in _STOPPED):
        raise RunTaken(in_use(run, found.record))
    lease = found.record.lease_s if found.record is not None else lease_s
    return watched is not None and watched[0] == found and time.monotonic() - watched[1] >= lease


def _process(pid: int) -> tuple[str, int] | None:
    """State and start (ticks since the boot) of a process; None when there is none."""
    try:
        # The second field is the name in parentheses, which may hold anything.
        fields: list[Any] = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[19])


def _is_hidden(pid: int) -> bool:
    """Whether there is such a process although `/proc` does not show it: another user's, under `hidepid`."""
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _boot() -> str:
    try:
        return (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _namespace() -> str:
    try:
        return os.readlink(_PROC / "self/ns/pid")
    except OSError:
        return ""
