"""Files and folders that appear whole or not at all, however the writer ends.

Until it is complete, new content lies under a hidden name, `.NAME.….partial`, in the same folder; then it is renamed.
`env_servers` may import nothing of ours and has its own (`env_servers/server/sockets.py`).

Invariants
- A reader sees the old content, the new content, or no file; never a part.
- After an error nothing is left behind. Only a killed process leaves a `.partial`.
- With `durable`, content and name have reached the disk on return; without, a power failure may lose both, but still
  leaves no part under the name on the file systems that order data before a rename (ext4, XFS, Btrfs).
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial"


def write_whole(path: Path, content: bytes | str, *, mode: int = 0o666, durable: bool = False) -> None:
    """Replace a file by one with this content (text as UTF-8). Arguments and errors: see `replacing`."""
    with replacing(path, mode=mode, durable=durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(path: Path, *, mode: int = 0o666, durable: bool = False) -> Iterator[BinaryIO]:
    """Replace a file by what the block writes, once the block has ended without an error.

    Args:
        path: its folder must exist.
        mode: permissions of the new file, less the umask. No one else can read the content earlier either.
        durable: fsync the file and its folder.

    Raises:
        OSError: the file cannot be written.

    Example:
        with replacing(folder / "latest.json", durable=True) as file:
            for chunk in chunks:
                file.write(chunk)
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        with open(partial, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


@contextmanager
def new_folder(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Fill a folder that gets its name once the block has ended without an error.

    The block gets `.NAME.partial` beside it, empty; one that a killed process has left is removed first. One writer of
    a folder at a time. By the end of the block `path` must be free or an empty folder.

    Args:
        path: folders above it are made.
        durable: fsync the name. The files in the folder are the block's business (`services.manifest.write`).

    Raises:
        OSError: the folder cannot be written, or `path` is in use.
    """
    partial = path.with_name(f".{path.name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if durable:
        sync(path.parent)


def append(path: Path, content: bytes | str, *, mode: int = 0o666) -> None:
    """Append to a file (text as UTF-8), which need not exist yet; durable on return. Its folder must exist.

    Args:
        path: of the file.
        content: written by one call, so that lines of several writers do not mix.
        mode: permissions of a new file, less the umask.

    Raises:
        OSError: the file cannot be written. A part of the content may be there.
    """
    with open(path, "ab", buffering=0, opener=lambda name, flags: os.open(name, flags, mode)) as file:
        rest = memoryview(content.encode() if isinstance(content, str) else content)
        while rest:  # a full disk may take a part, and refuses the next
            rest = rest[file.write(rest) :]
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Make the content of a file, or the names in a folder, durable. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
