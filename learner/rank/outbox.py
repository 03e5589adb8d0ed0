"""Sends rank 0's snapshots of the weights through a channel, in a thread, while the rank goes on.

Invariants
- One snapshot is sent at a time. The next one is not begun before the last is announced.
- A failure is raised once, by the call after it.
- A rank that ends does not wait for a transfer: its Redis or its cluster may be gone.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, wait

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
        self._sending: Future[WeightVersion] | None = None

    def room(self, nbytes: int) -> MemoryFile:
        """Memory for the next snapshot, once the last one is announced. Raises WeightsUnavailable."""
        self.announced(None)
        self.channel.make_room()
        return self._pool.take(nbytes)

    def send(self, version: int, snapshot: MemoryFile) -> None:
        """Begin to send what `room` returned, filled."""
        snapshot.unlock()
        self._sending = Future()
        # Not of an executor: the interpreter waits for an executor's threads before it ends.
        arguments = (self._sending, version, snapshot)
        threading.Thread(target=self._send, args=arguments, name="weights", daemon=True).start()

    def _send(self, sending: Future[WeightVersion], version: int, snapshot: MemoryFile) -> None:
        try:
            sending.set_result(self.channel.send(version, snapshot))
        except BaseException as error:
            sending.set_exception(error)

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
