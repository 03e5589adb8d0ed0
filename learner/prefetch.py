"""Read and decode complete groups in the background, so that an update does not wait for Redis.

Invariants
- Only wanted groups are held; the dispatcher bounds their number.
- Nothing is decided here: the reader checks whether a group is complete, fresh and still wanted.
- A group read while another read is in progress is not held: it may have been removed and issued again in between.
- Each turn asks only for the groups closed since the turn before.
- Errors are not raised here; the reader hits the same error on its own read. Prefetching resumes once it has passed.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable

from services.buffer import FROM_THE_START, Buffer
from services.codec import CodecError
from services.errors import AnchorageError
from services.schemas import Trajectory

POLL_S = 0.1
CLOSING_S = 5.0

log = logging.getLogger(__name__)


class Prefetcher:
    """Prefetches groups of one stream in a thread of its own. Thread-safe; a context manager."""

    def __init__(self, buffer: Buffer, stream: str) -> None:
        self._buffer = buffer
        self._stream = stream
        self._lock = threading.Lock()
        self._wanted: frozenset[int] = frozenset()
        self._held: dict[int, list[Trajectory]] = {}
        self._reads = 0
        self._upto = FROM_THE_START
        self._complete: set[int] = set()
        self._lowest = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)

    def __enter__(self) -> Prefetcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join(CLOSING_S)

    def want(self, groups: Iterable[int]) -> None:
        """Prefetch these groups and drop all others."""
        with self._lock:
            self._wanted = frozenset(groups)
            lowest = min(self._wanted, default=self._lowest)
            if lowest < self._lowest:  # the learner went back to a checkpoint: what was forgotten is complete still
                self._upto = FROM_THE_START
            self._lowest = lowest
            self._complete = {group for group in self._complete if group >= lowest}
            self._held = {group: read for group, read in self._held.items() if group in self._wanted}

    def read(self, group: int) -> list[Trajectory]:
        """Return a group as `Buffer.read` does, at once if it was prefetched. A second call reads from Redis."""
        with self._lock:
            self._reads += 1
            held = self._held.pop(group, None)
            self._complete.discard(group)  # or it would be read once more; if it is played again, it is closed again
        return held if held is not None else self._buffer.read(self._stream, group)

    def _run(self) -> None:
        while not self._closed.wait(POLL_S):
            try:
                self._prefetch()
            except AnchorageError as error:
                log.info("prefetch failed; retrying: %s", error)

    def _prefetch(self) -> None:
        with self._lock:
            missing, reads, after = self._wanted - self._held.keys(), self._reads, self._upto
        if not missing:
            return
        news = self._buffer.closed(self._stream, after)
        with self._lock:
            self._upto = news.upto if self._upto == after else self._upto
            self._complete.update(group for group in news.complete if group >= self._lowest)
            there = sorted(missing & self._complete)
        for group in there:
            try:
                read = self._buffer.read(self._stream, group)
            except (KeyError, CodecError):
                with self._lock:
                    self._complete.discard(group)
                continue  # removed meanwhile, or damaged: the reader finds out on its own read
            with self._lock:
                # A reader that came in between may have found the group stale and issued it again under this number.
                if reads != self._reads:
                    return
                if group in self._wanted:
                    self._held[group] = read
