"""Reads and decodes complete groups in the background, so that an update does not wait for Redis.

Invariants
- At most the wanted groups are held, which the dispatcher bounds.
- Nothing is decided here: whether a group is complete, fresh or still wanted is checked by whoever uses it.
- What is read while somebody else reads is not held: the group may have been removed and issued again in between.
- Trouble is left to the reader, who meets it himself; the reading ahead goes on once it has passed.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable

from services.buffer import Buffer
from services.codec import CodecError
from services.errors import AnchorageError
from services.schemas import Trajectory

POLL_S = 0.1
CLOSING_S = 5.0

log = logging.getLogger(__name__)


class Prefetcher:
    """Groups of one stream, read ahead by a thread of its own. Thread-safe."""

    def __init__(self, buffer: Buffer, stream: str) -> None:
        self._buffer = buffer
        self._stream = stream
        self._lock = threading.Lock()
        self._wanted: frozenset[int] = frozenset()
        self._held: dict[int, list[Trajectory]] = {}
        self._reads = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)

    def __enter__(self) -> Prefetcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join(CLOSING_S)

    def want(self, groups: Iterable[int]) -> None:
        """Read these ahead; let go of all others."""
        with self._lock:
            self._wanted = frozenset(groups)
            self._held = {group: read for group, read in self._held.items() if group in self._wanted}

    def read(self, group: int) -> list[Trajectory]:
        """As `Buffer.read`; at once where the group was read ahead. Whoever asks again asks Redis."""
        with self._lock:
            self._reads += 1
            held = self._held.pop(group, None)
        return held if held is not None else self._buffer.read(self._stream, group)

    def _run(self) -> None:
        while not self._closed.wait(POLL_S):
            try:
                self._look()
            except AnchorageError as error:
                log.info("no group is read ahead: %s", error)

    def _look(self) -> None:
        with self._lock:
            missing, reads = self._wanted - self._held.keys(), self._reads
        if not missing:
            return
        for group in sorted(missing.intersection(self._buffer.complete(self._stream))):
            try:
                read = self._buffer.read(self._stream, group)
            except (KeyError, CodecError):
                continue  # it left Redis meanwhile, or the reader will be told what is wrong with it
            with self._lock:
                if reads != self._reads:
                    return
                if group in self._wanted:
                    self._held[group] = read
