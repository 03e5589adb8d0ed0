"""A growing file of JSON lines, read once: each look takes only what was added.

Invariants
- A line that is still being written is left for the next look; a broken one is skipped.
- When the file was replaced or cut (a resumed run), it is read anew, and `generation` counts up.
- At most `MAX_RECORDS` records are held, the newest.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any, BinaryIO

import orjson

MAX_RECORDS = 200_000


class JsonLines:
    """Thread-safe."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._inode = -1
        self._offset = 0
        self._records: list[dict[str, Any]] = []
        self.generation = 0

    def records(self) -> list[dict[str, Any]]:
        """All records so far, oldest first; none where there is no file."""
        with self._lock:
            try:
                with self._path.open("rb") as file:
                    self._read(file)
            except OSError:
                self._forget(-1)
            return list(self._records)

    def _read(self, file: BinaryIO) -> None:
        stat = os.fstat(file.fileno())
        if stat.st_ino != self._inode or stat.st_size < self._offset:
            self._forget(stat.st_ino)
        file.seek(self._offset)
        data = file.read()
        whole = data.rfind(b"\n") + 1
        self._offset += whole
        self._records += [record for line in data[:whole].splitlines() if (record := _parse(line)) is not None]
        del self._records[:-MAX_RECORDS]

    def _forget(self, inode: int) -> None:
        if self._inode != -1:
            self.generation += 1
        self._inode, self._offset, self._records = inode, 0, []


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = orjson.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
