"""Sends rank 0's snapshots of the weights through a channel, in a thread, while the rank goes on.

Invariants
- One snapshot is sent at a time. The next one is not begun before the last is announced.
- A failure is raised once, by the call after it.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait

from services.weights import StoringChannel, WeightVersion
from services.weights.memory import MemoryFile, MemoryPool


class Outbox:
    """What this rank has to send through one channel.

    Args:
        channel: of the run.

    Attributes:
        channel: the same.
    """

    def __init__(self, channel: StoringChannel) -> None:
        self.channel = channel
        self._pool = MemoryPool()
        self._thread = ThreadPoolExecutor(1, "weights")
        self._sending: Future[WeightVersion] | None = None

    def room(self, nbytes: int) -> MemoryFile:
        """Memory for the next snapshot, once the last one is announced. Raises WeightsUnavailable."""
        self.announced(None)
        self.channel.make_room()
        return self._pool.take(nbytes)

    def send(self, version: int, snapshot: MemoryFile) -> None:
        """Begin to send what `room` returned, filled."""
        snapshot.unlock()
        self._sending = self._thread.submit(self.channel.send, version, snapshot)

    def announced(self, timeout_s: float | None) -> bool:
        """Wait up to `timeout_s`, or without a limit; return whether all that was sent is announced.

        Raises:
            WeightsUnavailable: it could not be stored.
        """
        sending = self._sending
        if sending is None:
            return True
        if wait([sending], timeout_s).not_done:
            return False
        self._sending = None
        sending.result()
        return True
