"""The place of a process among the processes of its server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class WorkerPlace:
    """The place of one process.

    Attributes:
        number: number of the process, from 1; never reused.
        folder: folder of the processes' sockets.
        all_sessions: session limit of all processes together.
    """

    number: int
    folder: Path
    all_sessions: int
