"""Repair of a redis-server's damaged append-only data: keep the intact beginning, move the rest aside.

Whatever Redis loses is played again, so a run can continue with the part that is left, or with nothing.

Invariants
- Nothing is deleted. What is removed is in `damaged-<time>` in the same folder; a removed end of a file carries the
  file's name and the position at which it began.
- What stays is a prefix of the data up to the last complete transaction, so an earlier state of them. Redis itself
  would cut inside a transaction and, two starts later, join the first half to the end of another one.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from services.files import write_whole

FILE_NAME = "appendonly.aof"
"""The file that Redis up to 6 writes."""
FOLDER_NAME = "appendonlydir"
"""The folder that Redis writes from 7 on: a manifest, a base and increments."""
MANIFEST_NAME = f"{FILE_NAME}.manifest"
ASIDE_NAME = "damaged"

_DAMAGE = re.compile(
    r"bad file format|unexpected end of file|unknown command '|unable to obtain the aof file|manifest|bug report"
    r"|error reading the (rdb preamble|append)|unrecoverable error reading the append|fatal error loading the db"
    r"|internal error in rdb|wrong rdb checksum|rdb.*(unrecoverable|terminating|failure)|short read"
    r"|aof file .*(doesn't exist|not the last)|out of memory allocating",
    re.IGNORECASE,
)
_UNUSABLE = re.compile(
    r"permission denied|no space left|read-only file system|input/output error|too many open files|is a directory",
    re.IGNORECASE,
)
_UNKNOWN_COMMAND = re.compile(r"unknown command '([^']*)'", re.IGNORECASE)
_COUNT = re.compile(rb"\*(\d{1,7})\r\n")
_LENGTH = re.compile(rb"\$(\d{1,10})\r\n")
_NOTE = re.compile(rb"#[^\r\n]*\r\n")
_RDB_END = re.compile(rb"\xff.{8}(?=\*\d{1,7}\r\n\$\d{1,10}\r\n)", re.DOTALL)
_ENTRY = re.compile(r"file (\S+) seq (\d+) type ([bhi])")
_PART = re.compile(re.escape(FILE_NAME) + r"\.(\d+)\.(base|incr)\.(?:aof|rdb)")


def reports_damage(log: str) -> bool:
    """Whether the log of a server that failed to start reports damaged data, and not data that it could not access."""
    return _DAMAGE.search(log) is not None and _UNUSABLE.search(log) is None


def exists(folder: Path) -> bool:
    """Whether the folder holds append-only data."""
    return (folder / FILE_NAME).exists() or (folder / FOLDER_NAME).exists()


@dataclass(frozen=True, slots=True)
class Mended:
    """Outcome of a repair.

    Attributes:
        aside: folder that holds what was removed.
        kept: bytes that stayed.
        total: bytes before the repair.
    """

    aside: Path
    kept: int
    total: int


def lacks_manifest(folder: Path) -> bool:
    """Whether parts are there without their manifest: a server would ignore and overwrite them."""
    parts = folder / FOLDER_NAME
    return parts.is_dir() and not (parts / MANIFEST_NAME).exists() and any(parts.iterdir())


def mend(folder: Path, log: str = "") -> Mended:
    """Move aside what is not intact. `log` is the log of the server that failed. Raises OSError."""
    aside = _new_folder(folder)
    unknown = _UNKNOWN_COMMAND.search(log)
    command = unknown.group(1).encode() if unknown is not None else None
    files = [folder / FILE_NAME, *(folder / FOLDER_NAME).glob("*")]
    total = sum(path.stat().st_size for path in files if path.is_file())
    if (folder / FOLDER_NAME).is_dir():
        return Mended(aside, _cut_parts(folder / FOLDER_NAME, aside, command), total)
    return Mended(aside, _cut(folder / FILE_NAME, aside, command), total)


def start_over(folder: Path) -> Path:
    """Move all data aside; the folder that now holds them. Raises OSError."""
    aside = _new_folder(folder)
    for name in (FILE_NAME, FOLDER_NAME):
        if (folder / name).exists():
            os.rename(folder / name, aside / name)
    return aside


def intact_length(path: Path, unknown: bytes | None = None) -> int:
    """Number of bytes of the file up to the end of its last complete transaction.

    A beginning in RDB format counts as intact; if its end cannot be found, so does the whole file.

    Args:
        path: an append-only file.
        unknown: name of a command that the server did not know: it and all after it is damaged.

    Example:
        SET a 1 | MULTI SET b 1 EXEC | MULTI SET c 1 (torn)
        ------- intact ------------- |  removed: the transaction has no EXEC
    """
    size = path.stat().st_size
    if size == 0:
        return 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        intact = _log_start(data)
        if intact is None:
            return size
        within = False
        for name, end in _commands(data, intact):
            if name == unknown:
                break
            within = name.upper() != b"EXEC" and (within or name.upper() == b"MULTI")
            intact = intact if within else end
        return intact


def _log_start(data: mmap.mmap) -> int | None:
    """Offset of the first command, after a beginning in RDB format if there is one; None if it cannot be found."""
    if data[:5] != b"REDIS":
        return 0
    for found in _RDB_END.finditer(data):
        if next(_commands(data, found.end()), None) is not None:
            return found.end()
    return None


def _commands(data: mmap.mmap, position: int) -> Iterator[tuple[bytes, int]]:
    """Name and end offset of each complete command from `position` on, until something is not a command."""
    while True:
        while (note := _NOTE.match(data, position)) is not None:  # a time stamp
            position = note.end()
        count = _COUNT.match(data, position)
        if count is None:
            return
        position, name = count.end(), b""
        for number in range(int(count.group(1))):
            length = _LENGTH.match(data, position)
            if length is None:
                return
            begin, end = length.end(), length.end() + int(length.group(1))
            if data[end : end + 2] != b"\r\n":
                return
            name = data[begin:end] if number == 0 else name
            position = end + 2
        yield name, position


def _new_folder(folder: Path) -> Path:
    name = f"{ASIDE_NAME}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    for number in itertools.count():
        aside = folder / (f"{name}-{number}" if number else name)
        with contextlib.suppress(FileExistsError):
            aside.mkdir()
            return aside
    raise AssertionError


def _cut(path: Path, aside: Path, unknown: bytes | None) -> int:
    """Move the damaged end of a file aside, or all of it if nothing is intact; the number of bytes that stay."""
    length = intact_length(path, unknown)
    if length == 0:
        os.rename(path, aside / path.name)
    elif length < path.stat().st_size:
        with path.open("rb") as whole, (aside / f"{path.name}.from-{length}").open("wb") as end:
            whole.seek(length)
            shutil.copyfileobj(whole, end)
        os.truncate(path, length)
    return length


def _cut_parts(folder: Path, aside: Path, unknown: bytes | None) -> int:
    """The same for base and increments in their order. All parts after the first damaged one are moved, too."""
    parts, kept, lines = _parts(folder), 0, []
    for path in [path for path in folder.iterdir() if path.name not in {name for name, _, _ in parts}]:
        os.rename(path, aside / path.name)
    intact = True
    for name, number, kind in parts:
        size = (folder / name).stat().st_size
        if not intact:
            os.rename(folder / name, aside / name)
            continue
        # Only Redis can tell whether a base in RDB format is intact, when it loads it.
        length = size if name.endswith(".rdb") else _cut(folder / name, aside, unknown)
        (folder / name).touch()
        intact = length == size
        kept += length
        lines.append(f"file {name} seq {number} type {kind}\n")
    if lines:
        write_whole(folder / MANIFEST_NAME, "".join(lines))
    return kept


def _parts(folder: Path) -> list[tuple[str, str, str]]:
    """Name, number and kind of the base and the increments, in order, up to the first that is missing."""
    if not folder.is_dir():
        return []
    try:
        entries = _ENTRY.findall((folder / MANIFEST_NAME).read_text())
    except (OSError, UnicodeDecodeError):
        entries = []
    entries = [entry for entry in entries if entry[2] != "h"] or _guessed_parts(folder)
    if not entries or entries[0][2] != "b":
        return []
    return list(itertools.takewhile(lambda entry: (folder / Path(entry[0]).name).is_file(), entries))


def _guessed_parts(folder: Path) -> list[tuple[str, str, str]]:
    """Without a manifest: one base and at most one increment. With several the order is unknown, so none."""
    found = [match for path in sorted(folder.iterdir()) if (match := _PART.fullmatch(path.name)) is not None]
    parts = [(match[0], match[1], match[2][0]) for match in found]
    return parts if sorted(kind for _, _, kind in parts) in (["b"], ["b", "i"]) else []
