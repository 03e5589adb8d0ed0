"""Whether a folder can be written, found out before the work that would write it."""

from __future__ import annotations

import os
from pathlib import Path


def nearest_folder(folder: Path) -> Path:
    """Return the part of a path that exists: the path itself, or the nearest of its parents."""
    return next(above for above in (folder.absolute(), *folder.absolute().parents) if above.exists())


def folder_problem(folder: Path) -> str | None:
    """Return why a folder cannot be written, or created where it is missing; None where it can. Leaves no trace."""
    there = nearest_folder(folder)
    if not there.is_dir():
        return f"{there} is a file"
    return None if os.access(there, os.W_OK | os.X_OK) else f"{there} is read-only"
