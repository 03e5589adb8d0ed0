"""Figures of the buffer and its Redis at one moment, as plain data for dashboards and the trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class StreamStats:
    """Number of groups of one stream by state."""

    open: int = 0
    complete: int = 0
    cancelled: int = 0


@dataclass(frozen=True, slots=True)
class BufferStats:
    """Figures of one run's buffer.

    Attributes:
        queued: tickets that wait for an actor.
        leased: tickets that an actor holds.
        streams: groups by stream.
        trajectory_bytes: size of all stored trajectories.
        cap_bytes: the cap on it (`buffer.max_mib`).
    """

    queued: int
    leased: int
    streams: Mapping[str, StreamStats]
    trajectory_bytes: int
    cap_bytes: int

    @property
    def full(self) -> bool:
        """Whether it is above the cap: no new group begins until complete ones are removed."""
        return self.trajectory_bytes > self.cap_bytes


@dataclass(frozen=True, slots=True)
class Closed:
    """Groups of one stream that were completed or cancelled after a moment; see `Buffer.closed`.

    Attributes:
        upto: the moment that the next call continues from.
        complete: numbers of complete groups, in the order of their completion.
        cancelled: reason by number of cancelled groups.
    """

    upto: int
    complete: list[int]
    cancelled: dict[int, str]


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The last heartbeat of an actor.

    Attributes:
        facts: what the actor reported.
        heard_s: its age in seconds, by the run's clock in Redis.
    """

    facts: dict[str, object]
    heard_s: float


@dataclass(frozen=True, slots=True)
class ServerStats:
    """Figures of a Redis server.

    Attributes:
        used_bytes: memory in use.
        max_bytes: memory limit, 0 for none.
        clients: number of connections.
        aof_enabled: whether it writes an append-only file.
        aof_healthy: whether the last write and the last rewrite of that file succeeded.
        aof_bytes: size of that file.
    """

    used_bytes: int
    max_bytes: int
    clients: int
    aof_enabled: bool
    aof_healthy: bool
    aof_bytes: int


def parse_info(info: Mapping[str, Any]) -> ServerStats:
    """Parse the reply of Redis' INFO."""
    return ServerStats(
        used_bytes=int(info.get("used_memory", 0)),
        max_bytes=int(info.get("maxmemory", 0)),
        clients=int(info.get("connected_clients", 0)),
        aof_enabled=bool(info.get("aof_enabled", 0)),
        aof_healthy=all(
            info.get(name, "ok") == "ok" for name in ("aof_last_write_status", "aof_last_bgrewrite_status")
        ),
        aof_bytes=int(info.get("aof_current_size", 0)),
    )
