"""The console of the commands, and the files that they write: whether a file can be written is checked first."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

from rich.console import Console

from services.errors import AnchorageError


def literal_console(file: IO[str] | None = None, width: int | None = None) -> Console:
    """Return a console that prints text as it is: `[/x]` in a reason, a name or a path is no markup, `:x:` no emoji."""
    return Console(file=file, width=width, markup=False, emoji=False)


def require_writable(*files: Path | None) -> None:
    """Raise AnchorageError for the first of `files` that could not be written. Leaves no trace."""
    for file in files:
        if file is None:
            continue
        # A new file is tried under another name: whoever waits for it must not see it empty.
        probe = file if file.exists() else file.with_name(f".{file.name}.{os.getpid()}")
        try:
            probe.open("ab").close()
            if probe != file:
                probe.unlink()
        except OSError as error:
            raise unwritable(file, error) from None


def write_text(file: Path, text: str) -> None:
    """Write the file. Raises AnchorageError."""
    try:
        file.write_text(text)
    except OSError as error:
        raise unwritable(file, error) from None


def unwritable(file: Path, error: OSError) -> AnchorageError:
    """The one line for a file that cannot be written."""
    return AnchorageError(f"cannot write {file}: {error.strerror}")
