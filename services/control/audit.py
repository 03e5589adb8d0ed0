"""The audit log of a run: who requested what, when, and with what result. One JSON line an entry, in the run's folder.

Invariants
- Append-only, and on disk before the caller gets a response. An action that cannot be recorded is not executed.
"""

from __future__ import annotations

import time
from pathlib import Path

from services.control.json_lines import JsonLines
from services.control.views import AuditEntry
from services.errors import AnchorageError
from services.files import append
from services.run_folder import AUDIT_NAME


class AuditUnwritable(AnchorageError):
    """The audit log cannot be written, so no action is executed."""


class Audit:
    """The audit log in one run's folder."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / AUDIT_NAME

    def note(self, by: str, action: str, result: str, *, actors: int | None = None, command: str | None = None) -> None:
        """Append a line; it is on disk on return. Raises AuditUnwritable."""
        entry = AuditEntry(at=time.time(), by=by, action=action, actors=actors, command=command, result=result)
        try:
            append(self._path, entry.model_dump_json() + "\n", mode=0o640)
        except OSError as error:
            raise AuditUnwritable(f"cannot write the audit log: {error.strerror}") from None

    def entries(self, count: int) -> list[AuditEntry]:
        """The newest `count` lines, oldest first."""
        return [AuditEntry.model_validate(record) for record in JsonLines(self._path).records()[-count:]]
