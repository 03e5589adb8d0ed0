"""The learner's side of a run without a model: dispatcher, intake, prefetcher and weight channel are the real ones.

An update takes no time. The groups that it took leave Redis at once, as after a checkpoint.
"""

from __future__ import annotations

import threading
import time

import numpy as np

from learner.dispatch import Dispatcher
from learner.dynamic_sampling import Collected
from learner.intake import Intake
from learner.prefetch import Prefetcher
from services.buffer import Buffer
from services.config.tree import Config
from services.schemas import TRAIN_STREAM, Ticket
from services.weights.directory import DirectoryChannel
from services.weights.memory import MemoryFile

SPLITS = {"train": 3000}
WEIGHTS_BYTES = 65_536
"""Small: what is measured is how soon every actor hears of a version, not how fast it travels."""


class CountingBuffer(Buffer):
    """A buffer that counts the leases which its calls find expired."""

    expired = 0

    def expire(self) -> int:
        found = super().expire()
        self.expired += found
        return found


class Collecting(threading.Thread):
    """Takes the groups of one update after the other until `stop`.

    Attributes:
        dispatcher: of the run.
        updates: number of updates.
        tickets: all whose trajectories were taken; each once, or `error` says so.
        published: when each version was sent, by locator, on the machine's monotonic clock.
        error: why it has ended before `stop`.
    """

    def __init__(self, config: Config, buffer: Buffer) -> None:
        super().__init__(name="learner", daemon=True)
        self._config = config
        self._buffer = buffer
        self._channel = DirectoryChannel(config.run.folder / "weights", config.weights.timeout_s)
        self._prefetch = Prefetcher(buffer, TRAIN_STREAM)
        self._ended = threading.Event()
        self.dispatcher = Dispatcher(config, SPLITS)
        self.updates = 0
        self.tickets: set[str] = set()
        self.published: dict[str, float] = {}
        self._publishing = threading.Lock()
        self.error: Exception | None = None

    def stop(self) -> None:
        """End after the poll in hand."""
        self._ended.set()
        self.join()

    def publish(self) -> None:
        """Announce other weights, as those of the present version."""
        with self._publishing:
            file = MemoryFile(WEIGHTS_BYTES)
            file.payload[:8] = np.frombuffer(len(self.published).to_bytes(8, "little"), dtype=np.uint8)
            began = time.monotonic()  # an actor may have loaded it before `send` returns
            self.published[self._channel.send(self.updates, file).locator] = began
            file.close()

    def run(self) -> None:
        try:
            with self._prefetch:
                while self._update():
                    pass
        except Exception as error:
            self.error = error

    def _update(self) -> bool:
        intake = Intake(self._config.learner, self._buffer, self.dispatcher, self._prefetch)
        window = self.dispatcher.window()
        collected = intake.collect(self.updates, self._ended.is_set)
        if collected is None:
            return False
        self._check(collected, window)
        self.updates += 1
        self.dispatcher.settle(list(collected.groups))
        self.publish()
        self._buffer.remove(TRAIN_STREAM, self.dispatcher.finished(self._buffer.known(TRAIN_STREAM)))
        return True

    def _check(self, collected: Collected, window: list[int]) -> None:
        """Note the tickets. Raises ValueError if one of them was taken before, is missing, or is out of order."""
        if collected.stale or collected.unreadable or collected.cancelled:
            raise ValueError(f"update {self.updates + 1} left groups out: {collected}")
        if window and list(collected.groups) != window:
            raise ValueError(f"update {self.updates + 1} took other groups than those of its window")
        tickets: list[Ticket] = [t.ticket for group in collected.groups.values() for t in group]
        if tickets != self.dispatcher.tickets(collected.groups):
            raise ValueError(f"update {self.updates + 1} took other trajectories than those of its groups")
        known = len(self.tickets)
        self.tickets.update(ticket.id for ticket in tickets)
        if len(self.tickets) != known + len(tickets):
            raise ValueError(f"update {self.updates + 1} took trajectories that were taken before")
