"""A tracker in a thread of its own, behind a bounded queue: the run queues a record and continues.

Invariants
- `write` never waits and never raises. Records that do not fit in the queue are dropped; `metrics.jsonl` is complete.
- One thread creates, uses and closes a tracker. An exception loses the current record, not later ones; if the tracker
  cannot be created, all records are lost.
- Each tracker logs at most one warning.
- `close` waits at most `CLOSE_S`; a thread that hangs does not keep the process alive.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from services.plugins import raised
from services.tracking import RunInfo, Tracker

QUEUE = 1000
"""Capacity of the queue, in records: some hours of updates, which take seconds each."""
CLOSE_S = 30.0
"""Time limit of `close`, in seconds."""

log = logging.getLogger(__name__)

Record = tuple[int, dict[str, float]]
T = TypeVar("T")


class BackgroundTracker:
    """Passes records to one tracker, which `make` creates in the thread."""

    def __init__(self, name: str, make: Callable[[RunInfo], Tracker], run: RunInfo, *, limit: int = QUEUE) -> None:
        self._name = name
        self._records: queue.Queue[Record | None] = queue.Queue(limit)
        self._warned = False
        self._thread = threading.Thread(target=self._run, args=(make, run), name=f"tracker {name}", daemon=True)
        self._thread.start()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Queue a record; it is dropped if the queue is full."""
        try:
            self._records.put_nowait((step, {name: float(value) for name, value in scalars.items()}))
        except queue.Full:
            self._warn(f"queue of {self._records.maxsize} records is full, further records are dropped")

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Write the queued records and close the tracker, within `timeout_s` seconds. May be called again."""
        if not self._thread.is_alive():
            return
        deadline = time.monotonic() + timeout_s
        with contextlib.suppress(queue.Full):
            self._records.put(None, timeout=timeout_s)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._warn(f"did not finish within {timeout_s:g} s")

    def _run(self, make: Callable[[RunInfo], Tracker], run: RunInfo) -> None:
        tracker = self._tried(lambda: make(run))
        while (record := self._records.get()) is not None:
            if tracker is not None:
                self._write(tracker, record)
        if tracker is not None:
            self._tried(tracker.close)

    def _write(self, tracker: Tracker, record: Record) -> None:
        self._tried(lambda: tracker.write(*record))

    def _tried(self, act: Callable[[], T]) -> T | None:
        try:
            return act()
        except Exception as error:
            self._warn(raised(error))
            return None

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning("metrics tracker %s: %s; the run continues, metrics.jsonl is complete", self._name, reason)
