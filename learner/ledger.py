"""The ledger of a run: which group was trained on in which update, one JSON line each.

Invariants
- Append-only while training goes forward, synced to disk; cut back to the checkpoint's update when it goes back. So it
  always tells the history that survives, in which every group stands at most once.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from services.errors import CheckpointFailed

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """Update number (from 1), group, and the policy versions that wrote each member's tokens."""

    update: int
    group: int
    versions: list[list[int]]


class Ledger:
    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, entries: Sequence[Entry]) -> None:
        """Add the groups of an update; durable on return.

        Raises:
            CheckpointFailed: the file cannot be written.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.writelines(json.dumps(asdict(entry)) + "\n" for entry in entries)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CheckpointFailed(f"cannot write the ledger {self._path}: {error.strerror}") from error

    def read(self) -> list[Entry]:
        """All entries. A last line that was cut off while being written is none; damaged lines are skipped and named.

        Raises:
            CheckpointFailed: the file cannot be read.
        """
        try:
            lines = self._path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointFailed(f"cannot read the ledger {self._path}: {error.strerror}") from error
        entries = []
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                entries.append(_entry(line))
            except (ValueError, TypeError):
                log.warning("%s: line %d is damaged and is skipped", self._path, number)
        return entries

    def cut(self, update: int) -> None:
        """Forget what came after `update`, and damaged lines."""
        kept = [entry for entry in self.read() if entry.update <= update]
        temporary = self._path.with_suffix(".tmp")
        temporary.unlink(missing_ok=True)
        Ledger(temporary).append(kept)
        temporary.replace(self._path)


def _entry(line: bytes) -> Entry:
    """Raises ValueError or TypeError where the line is none."""
    entry = Entry(**json.loads(line))
    if not (isinstance(entry.update, int) and isinstance(entry.group, int) and isinstance(entry.versions, list)):
        raise TypeError("not an entry")
    return entry
