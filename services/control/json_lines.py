"""A growing file of JSON lines, read incrementally: each read takes only what was appended.

Invariants
- An incomplete last line is left for the next read; an invalid line is skipped.
- When the file was replaced or truncated (a resumed run), it is read from the start and `generation` changes. No two
  reads from the start have the same generation, also across processes of the control plane.
- At most the newest `MAX_RECORDS` records are held.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

import orjson

MAX_RECORDS = 200_000
TAIL_BYTES = 256


class JsonLines:
    """The records of one file. Thread-safe.

    Attributes:
        generation: changes whenever the file is read from the start.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._inode = -1
        self._offset = 0
        self._tail = b""
        self._records: list[dict[str, Any]] = []
        self.generation = _now()

    def records(self) -> list[dict[str, Any]]:
        """All records so far, oldest first; empty if there is no file."""
        return self.reading()[0]

    def reading(self) -> tuple[list[dict[str, Any]], int]:
        """All records so far, and their generation."""
        with self._lock:
            try:
                with self._path.open("rb") as file:
                    self._read(file)
            except OSError:
                self._forget(-1)
            return list(self._records), self.generation

    def _read(self, file: BinaryIO) -> None:
        inode = os.fstat(file.fileno()).st_ino
        # Inode numbers are reused, so the last bytes that were read must also still be there.
        file.seek(self._offset - len(self._tail))
        if inode != self._inode or file.read(len(self._tail)) != self._tail:
            self._forget(inode)
            file.seek(0)
        data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        self._tail = (self._tail + whole)[-TAIL_BYTES:]
        self._records += [record for line in whole.splitlines() if (record := _parse(line)) is not None]
        del self._records[:-MAX_RECORDS]

    def _forget(self, inode: int) -> None:
        if self._inode != -1:
            self.generation = max(self.generation + 1, _now())
        self._inode, self._offset, self._tail, self._records = inode, 0, b"", []


def _now() -> int:
    """Microseconds since 1970: a number that JavaScript can hold exactly."""
    return time.time_ns() // 1000


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = orjson.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
