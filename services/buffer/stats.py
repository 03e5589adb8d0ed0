"""What the buffer holds at one moment, for dashboards and for whoever must relieve it. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class StreamStats:
    """Groups of one stream by state."""

    open: int = 0
    complete: int = 0
    cancelled: int = 0


@dataclass(frozen=True, slots=True)
class BufferStats:
    """Tickets waiting and leased, groups per stream, and the stored trajectories' bytes against their cap."""

    queued: int
    leased: int
    streams: Mapping[str, StreamStats]
    trajectory_bytes: int
    cap_bytes: int

    @property
    def full(self) -> bool:
        """Beyond the cap: no new group is begun until complete ones are removed."""
        return self.trajectory_bytes > self.cap_bytes


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What an actor said last, and how many seconds ago by the clock of Redis."""

    facts: dict[str, object]
    heard_s: float


@dataclass(frozen=True, slots=True)
class ServerStats:
    """A Redis as it is: bytes used and allowed (0: no limit), connections, and its append-only file.

    Attributes:
        aof_enabled: it writes one. aof_healthy: its last write and its last rewriting went well. aof_bytes: its size.
    """

    used_bytes: int
    max_bytes: int
    clients: int
    aof_enabled: bool
    aof_healthy: bool
    aof_bytes: int


def parse_info(info: Mapping[str, Any]) -> ServerStats:
    """The answer of Redis' INFO."""
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
