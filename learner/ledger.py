"""The ledger of a run: which group was trained on in which update, one JSON object a line.

Invariants
- Append-only and synced to disk while training goes forward; cut back to the checkpoint's update when training resumes
  from it. So it always holds the surviving history, in which every group occurs at most once.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from services.errors import CheckpointFailed
from services.files import append, write_whole

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """One group of one update.

    Attributes:
        update: number of the update, from 1.
        group: number of the group.
        versions: for each member, the policy versions that wrote its tokens, ascending.
    """

    update: int
    group: int
    versions: list[list[int]]


class Ledger:
    """The ledger in the file at `path`, which need not exist yet."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, entries: Sequence[Entry]) -> None:
        """Append the groups of an update; durable on return.

        Raises:
            CheckpointFailed: the file cannot be written.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            append(self._path, "".join(json.dumps(asdict(entry)) + "\n" for entry in entries))
        except OSError as error:
            raise CheckpointFailed(f"cannot write the ledger {self._path}: {error.strerror}") from error

    def read(self) -> list[Entry]:
        """Return all entries, oldest first. Skips an incomplete last line silently, and damaged lines with a warning.

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
                log.warning("skipping damaged line %d of %s", number, self._path)
        return entries

    def cut(self, update: int) -> None:
        """Remove entries of later updates than `update`, and damaged lines. Raises CheckpointFailed as `append`."""
        kept = (json.dumps(asdict(entry)) + "\n" for entry in self.read() if entry.update <= update)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._path, "".join(kept), durable=True)
        except OSError as error:
            raise CheckpointFailed(f"cannot write the ledger {self._path}: {error.strerror}") from error


def _entry(line: bytes) -> Entry:
    """Parse one line. Raises ValueError or TypeError if it is not an entry."""
    entry = Entry(**json.loads(line))
    if not (isinstance(entry.update, int) and isinstance(entry.group, int) and isinstance(entry.versions, list)):
        raise TypeError("not an entry")
    return entry
