"""Sends rank 0's snapshots of the weights through a channel, in a thread, while the rank goes on.

Invariants
- One snapshot is sent at a time. The next one is not begun before the last is announced.
- A failure is raised once, by the call after it.
- A rank that ends does not wait for a transfer: its Redis or its cluster may be gone.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, wait

from services.weights import WeightChannel, WeightVersion
from services.weights.memory import MemoryFile, Snapshot
from services.weights.pinning import pin


class Outbox:
    """What this rank has to send through one channel.

    Args:
        channel: of the run.

    Attributes:
        channel: the same.
    """

    def __init__(self, channel: WeightChannel) -> None:
        self.channel = channel
        self._pool = channel.pool()
        self._sending: Future[WeightVersion] | None = None

    def room(self, nbytes: int) -> Snapshot:
        """Memory for the next snapshot, once the last one is announced. Raises WeightsUnavailable, RunTaken."""
        self.announced(None)
        self.channel.make_room()
        snapshot = self._pool.take(nbytes)
        if isinstance(snapshot, MemoryFile):
            pin(snapshot.payload)
        return snapshot

    def send(self, version: int, snapshot: Snapshot, digest: str | None = None) -> None:
        """Begin to send what `room` returned, filled, with the digest of its tensors if that is known already."""
        snapshot.unlock()
        self._sending = Future()
        # Not of an executor: the interpreter waits for an executor's threads before it ends.
        arguments = (self._sending, version, snapshot, digest)
        threading.Thread(target=self._send, args=arguments, name="weights", daemon=True).start()

    def _send(self, sending: Future[WeightVersion], version: int, snapshot: Snapshot, digest: str | None) -> None:
        try:
            sending.set_result(self.channel.send(version, snapshot, digest))
        except BaseException as error:
            sending.set_exception(error)

    def announced(self, timeout_s: float | None) -> bool:
        """Wait up to `timeout_s`, or without a limit; return whether all that was sent is announced.

        Raises:
            WeightsUnavailable: it could not be stored.
            RunTaken: another process owns the run by now; the version is not announced.
        """
        sending = self._sending
        if sending is None:
            return True
        if wait([sending], timeout_s).not_done:
            return False
        self._sending = None
        sending.result()
        return True

    def close(self) -> None:
        """Stop to send. What the channel stores stays."""
        self.channel.close()
