"""The buffer of tickets, trajectories and groups in Redis."""

from services.buffer.buffer import Buffer, Stored
from services.buffer.contents import GroupContents, TicketContents
from services.buffer.stats import BufferStats, Heartbeat, ServerStats, StreamStats

__all__ = [
    "Buffer",
    "BufferStats",
    "GroupContents",
    "Heartbeat",
    "ServerStats",
    "Stored",
    "StreamStats",
    "TicketContents",
]
