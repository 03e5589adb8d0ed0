"""Files and folders that a command is asked to write: whether they can be is found out before the work."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

from rich.console import Console

from services.errors import AnchorageError


def literal_console(file: IO[str] | None = None, width: int | None = None) -> Console:
    """A console that prints text as it is: in a reason, a name or a path `[/x]` is no markup and `:x:` no emoji."""
    return Console(file=file, width=width, markup=False, emoji=False)


def require_writable(*files: Path | None) -> None:
    """Raise AnchorageError for the first of `files` that could not be written. Leaves no trace."""
    for file in files:
        if file is None:
            continue
        is_new = not file.exists()
        try:
            file.open("ab").close()
            if is_new:
                file.unlink()
        except OSError as error:
            raise unwritable(file, error) from None


def nearest_folder(folder: Path) -> Path:
    """What there is of a path: itself, or the nearest of those above it."""
    return next(above for above in (folder.absolute(), *folder.absolute().parents) if above.exists())


def folder_problem(folder: Path) -> str | None:
    """Why a folder cannot be written, or made where it is missing; None where it can. Leaves no trace."""
    there = nearest_folder(folder)
    if not there.is_dir():
        return f"{there} is a file"
    return None if os.access(there, os.W_OK | os.X_OK) else f"{there} is read-only"


def write_text(file: Path, text: str) -> None:
    """Write the file. Raises AnchorageError."""
    try:
        file.write_text(text)
    except OSError as error:
        raise unwritable(file, error) from None


def unwritable(file: Path, error: OSError) -> AnchorageError:
    """The one line for a file that cannot be written."""
    return AnchorageError(f"cannot write {file}: {error.strerror}")
