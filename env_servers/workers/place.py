"""Where a process stands among those of its server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class WorkerPlace:
    """
    Attributes:
        number: of the process.
        folder: where the processes' sockets are.
        all_sessions: session limit of all processes together.
    """

    number: int
    folder: Path
    all_sessions: int
