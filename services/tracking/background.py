"""A tracker in a thread of its own, behind a bounded queue: the run hands a record over and goes on.

Invariants
- `write` never waits and never raises. What the queue has no room for is dropped; `metrics.jsonl` has it all.
- A tracker is made, used and closed by one thread. An exception costs the record at hand, not those after it; where the
  tracker cannot be made, all of them.
- There is one warning a tracker, whatever happens how often.
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
"""Records that may wait: of some hours, since an update takes seconds."""
CLOSE_S = 30.0

log = logging.getLogger(__name__)

Record = tuple[int, dict[str, float]]
T = TypeVar("T")


class BackgroundTracker:
    """Takes the records of one tracker, which `make` makes in the thread."""

    def __init__(self, name: str, make: Callable[[RunInfo], Tracker], run: RunInfo, *, limit: int = QUEUE) -> None:
        self._name = name
        self._records: queue.Queue[Record | None] = queue.Queue(limit)
        self._warned = False
        self._thread = threading.Thread(target=self._run, args=(make, run), name=f"tracker {name}", daemon=True)
        self._thread.start()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Hand a record over; dropped where too many are waiting."""
        try:
            self._records.put_nowait((step, {name: float(value) for name, value in scalars.items()}))
        except queue.Full:
            self._warn(f"it is behind by {self._records.maxsize} records, further ones are dropped")

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Let it write what is waiting, and close it. May be called again."""
        if not self._thread.is_alive():
            return
        deadline = time.monotonic() + timeout_s
        with contextlib.suppress(queue.Full):
            self._records.put(None, timeout=timeout_s)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._warn(f"it did not finish within {timeout_s:g} s")

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
