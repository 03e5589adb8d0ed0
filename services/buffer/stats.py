"""What the buffer holds at one moment, for dashboards and for whoever must relieve it. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


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
