"""Ownership of a run: one process at a time owns the run's name in a Redis.

Invariants
- Every writer of a run (its learner and its actors) sends the owner's token with every call. Once another process has
  taken over the name, such calls raise RunTaken and change nothing.
- A name is taken over from an owner that released it, from a process that is known to be dead (same machine, same
  process namespace), or from one that sent no heartbeat for its whole lease. The new owner measures that with its own
  monotonic clock, so setting a clock cannot take a name from a live run.
- A takeover deletes the data of any other lineage. A lineage identifies one start of a run in its folder: a new start
  gets a new one, a resumed run keeps that of its folder, a copied folder has none.
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
"""If Redis took longer to reply, it was unreachable, and the owner could not send heartbeats either."""
_LATEST = 1e11
"""Unix seconds that every platform can format as a date."""
_PROC = Path("/proc")
_DEAD = ("X", "Z")
_STOPPED = ("T", "t")
"""Process states, as the kernel names them. A stopped process may never continue."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Record:
    """The process that owns a run.

    Attributes:
        host: name of its machine.
        boot: id of the machine's current boot; process ids are unique within one boot and namespace.
        namespace: id of its process namespace.
        pid: its process id.
        started: when it started, in ticks since the boot, since process ids are reused.
        since: when it took over the run, Unix seconds.
        lease_s: after so many seconds without a heartbeat it may be replaced.
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
        """The record of the calling process."""
        pid = os.getpid()
        _, started = _process(pid) or ("", 0)
        return cls(socket.gethostname(), _boot(), _namespace(), pid, started, time.time(), lease_s)

    def state(self) -> str | None:
        """State letter of the process in the kernel, `X` if it is gone; None if it is not visible from here."""
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
    """Proof of ownership, sent with every writing call. Plain data, so that actors can have it too.

    Attributes:
        token: `NUMBER-ID`; later owners have higher numbers.
        lineage: of the run's data.
        record: the owner's `Record` as JSON.
    """

    token: str
    lineage: str
    record: str


@dataclass(frozen=True, slots=True)
class Found:
    """An owner as recorded in Redis.

    Attributes:
        token: its token.
        beats: number of its heartbeats.
        released: whether it released the name.
        record: its process; None if unreadable.
    """

    token: str
    beats: str
    released: bool
    record: Record | None


class OwnerStore(Protocol):
    """The part of a `Buffer` that stores the owner."""

    def owner(self) -> Found | None: ...
    def take(self, seen: Found | None, unique: str, lineage: str, record: str) -> str | None: ...
    def beat(self) -> None: ...
    def release_owner(self) -> None: ...


def take(
    buffer: OwnerStore,
    run: str,
    lineage: str,
    lease_s: float,
    *,
    alone: bool = False,
    waiting: Callable[[str], object] = log.info,
) -> Owner:
    """Take over the run's name. Blocks for up to the lease of an owner that may be dead.

    Args:
        buffer: where the owner is recorded.
        run: name of the run.
        lineage: of the run's data; see `services.run_folder.lineage`.
        lease_s: lease of the new owner, in seconds.
        alone: no other process can use this Redis, so a recorded owner is gone, or owns what this folder was copied of.
        waiting: called once with a line for people if this has to wait.

    Raises:
        RunTaken: another process owns the run.

    Example:
        lease 30 s, the recorded owner is on another machine:
        t =  0 s  token 17-a, beats 41    waiting("run first was not released by …")
        t = 12 s  token 17-a, beats 42    RunTaken: it is alive
        or, with no heartbeat until
        t = 30 s  token 17-a, beats 41    take over: token 18-b
    """
    record = RECORD.dump_json(Record.here(lease_s)).decode()
    unique = uuid.uuid4().hex
    watched: tuple[Found, float] | None = None
    warned = False
    while True:
        asked = time.monotonic()
        found = buffer.owner()
        if time.monotonic() - asked > PROMPT_S:
            watched = None  # Redis was unreachable, so the owner could not send heartbeats either
        if alone or found is None or _may_be_replaced(run, found, watched, lease_s):
            token = buffer.take(found, unique, lineage, record)
            if token is not None:
                return Owner(token, lineage, record)
            continue
        if watched is None and not warned:
            warned = True
            waiting(f"run {run} was not released by {found.record or 'its owner'}; waiting for its heartbeat")
        if watched is None or watched[0] != found:
            watched = (found, time.monotonic())
        time.sleep(POLL_S)


def number_of(token: str) -> int:
    """Number of an owner, by its token (`NUMBER-ID`). ValueError if it is no token."""
    return int(token.partition("-")[0])


def in_use(run: str, record: Record | None) -> str:
    """The message for a process that cannot take over the run."""
    whom = f"by {record}" if record is not None else "by another process"
    return f"run {run} is in use {whom}; stop that one, or give this one another run.name or Redis"


def parse_found(reply: list[bytes] | None) -> Found | None:
    """Parse the reply of `owner.lua`."""
    if not reply:
        return None
    token, beats, released, text = (part.decode(errors="replace") for part in reply)
    try:
        record = RECORD.validate_json(text)
    except ValidationError:
        record = None
    return Found(token, beats, bool(released), record)


class Ownership:
    """Keeps the ownership of a run: a thread sends `BEATS_A_LEASE` heartbeats per lease until `release`."""

    def __init__(self, buffer: OwnerStore, lease_s: float) -> None:
        self._buffer = buffer
        self._every_s = lease_s / BEATS_A_LEASE
        self._ended = threading.Event()
        self._lost: RunTaken | None = None
        self._thread = threading.Thread(target=self._run, name="owner", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> bool:
        """Whether another process has taken over the run."""
        return self._lost is not None

    def check(self) -> None:
        """Raise RunTaken if another process has taken over the run."""
        if self._lost is not None:
            raise self._lost

    def release(self) -> None:
        """Stop the heartbeats and release the name, unless another process has taken it over."""
        self._ended.set()
        self._thread.join(CLOSING_S)
        if self._thread.is_alive():
            log.warning("Redis is unreachable: run name not released, its lease will expire")
        elif self._lost is None:
            try:
                self._buffer.release_owner()
            except AnchorageError as error:
                log.warning("run name not released, its lease will expire: %s", error)

    def _run(self) -> None:
        while not self._ended.wait(self._every_s):
            try:
                self._buffer.beat()
            except RunTaken as error:
                self._lost = error
                return
            except RedisUnavailable as error:
                log.warning("owner heartbeat failed; retrying: %s", error)


def _may_be_replaced(run: str, found: Found, watched: tuple[Found, float] | None, lease_s: float) -> bool:
    """Whether the owner is gone, as far as is known by now. RunTaken if it is alive."""
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
    """State letter and start (ticks since the boot) of a process; None if there is none."""
    try:
        # The second field is the name in parentheses, which may contain any character.
        fields: list[Any] = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[19])


def _is_hidden(pid: int) -> bool:
    """Whether the process exists although `/proc` does not show it: another user's process under `hidepid`."""
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
