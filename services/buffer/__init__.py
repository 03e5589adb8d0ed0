"""The buffer of tickets, trajectories and groups in Redis."""

from services.buffer.buffer import FROM_THE_START, Buffer, Stored
from services.buffer.contents import GroupContents, Lease, TicketContents
from services.buffer.stats import BufferStats, Closed, Heartbeat, ServerStats, StreamStats

__all__ = [
    "FROM_THE_START",
    "Buffer",
    "BufferStats",
    "Closed",
    "GroupContents",
    "Heartbeat",
    "Lease",
    "ServerStats",
    "Stored",
    "StreamStats",
    "TicketContents",
]
