"""Damaged append-only data of a redis-server: what is damaged is set aside, and the sound beginning stays in its place.

Everything that Redis loses is played again, so a run goes on with what is left, or with nothing.

Invariants
- Nothing is deleted: what is taken away lies in `damaged-<time>` in the same folder, a cut end under the name of its
  file with the position it was cut at.
- What stays is the beginning of what was there, up to the last whole transaction: an earlier state of the data. Redis
  would cut in the middle of a transaction, and put the next one's end to it at the next start but one.
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
"""The file of Redis up to 6."""
FOLDER_NAME = "appendonlydir"
"""The folder of Redis from 7 on: a manifest, a base and increments."""
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


def tells_of_damage(log: str) -> bool:
    """Whether a server that ended at its start found its data damaged, by its log; not where it could not use them."""
    return _DAMAGE.search(log) is not None and _UNUSABLE.search(log) is None


def exists(folder: Path) -> bool:
    return (folder / FILE_NAME).exists() or (folder / FOLDER_NAME).exists()


@dataclass(frozen=True, slots=True)
class Mended:
    """Where the damaged data are now, and how many bytes of how many stayed."""

    aside: Path
    kept: int
    total: int


def lacks_manifest(folder: Path) -> bool:
    """A server would not find the data: it would begin with none, over those that are there."""
    parts = folder / FOLDER_NAME
    return parts.is_dir() and not (parts / MANIFEST_NAME).exists() and any(parts.iterdir())


def mend(folder: Path, log: str = "") -> Mended:
    """Set aside what is not sound; `log`: what the server said. Raises OSError when the folder cannot be written."""
    aside = _new_folder(folder)
    unknown = _UNKNOWN_COMMAND.search(log)
    command = unknown.group(1).encode() if unknown is not None else None
    files = [folder / FILE_NAME, *(folder / FOLDER_NAME).glob("*")]
    total = sum(path.stat().st_size for path in files if path.is_file())
    if (folder / FOLDER_NAME).is_dir():
        return Mended(aside, _cut_parts(folder / FOLDER_NAME, aside, command), total)
    return Mended(aside, _cut(folder / FILE_NAME, aside, command), total)


def start_over(folder: Path) -> Path:
    """Set aside what is there, whatever it is: where it is now."""
    aside = _new_folder(folder)
    for name in (FILE_NAME, FOLDER_NAME):
        if (folder / name).exists():
            os.rename(folder / name, aside / name)
    return aside


def sound_length(path: Path, unknown: bytes | None = None) -> int:
    """Bytes of the file up to its last whole transaction; `unknown` is a command that no server knows.

    A beginning in RDB format is taken as it is; all of the file where the end of that cannot be found.
    """
    size = path.stat().st_size
    if size == 0:
        return 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        sound = _log_start(data)
        if sound is None:
            return size
        within = False
        for name, end in _commands(data, sound):
            if name == unknown:
                break
            within = name.upper() != b"EXEC" and (within or name.upper() == b"MULTI")
            sound = sound if within else end
        return sound


def _log_start(data: mmap.mmap) -> int | None:
    """Where the commands begin, behind a beginning in RDB format; None where that is not known."""
    if data[:5] != b"REDIS":
        return 0
    for found in _RDB_END.finditer(data):
        if next(_commands(data, found.end()), None) is not None:
            return found.end()
    return None


def _commands(data: mmap.mmap, position: int) -> Iterator[tuple[bytes, int]]:
    """Name and end of each whole command from `position` on, up to the first thing that is none."""
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
    """Set the unsound end of a file aside, all of it where nothing is sound; bytes that stay."""
    length = sound_length(path, unknown)
    if length == 0:
        os.rename(path, aside / path.name)
    elif length < path.stat().st_size:
        with path.open("rb") as whole, (aside / f"{path.name}.from-{length}").open("wb") as end:
            whole.seek(length)
            shutil.copyfileobj(whole, end)
        os.truncate(path, length)
    return length


def _cut_parts(folder: Path, aside: Path, unknown: bytes | None) -> int:
    """The same with base and increments in their order: all behind the first that is damaged go, too."""
    parts, kept, lines = _parts(folder), 0, []
    for path in [path for path in folder.iterdir() if path.name not in {name for name, _, _ in parts}]:
        os.rename(path, aside / path.name)
    sound = True
    for name, number, kind in parts:
        size = (folder / name).stat().st_size
        if not sound:
            os.rename(folder / name, aside / name)
            continue
        # Whether a base in RDB format is sound is seen when Redis loads it.
        length = size if name.endswith(".rdb") else _cut(folder / name, aside, unknown)
        (folder / name).touch()
        sound = length == size
        kept += length
        lines.append(f"file {name} seq {number} type {kind}\n")
    if lines:
        write_whole(folder / MANIFEST_NAME, "".join(lines))
    return kept


def _parts(folder: Path) -> list[tuple[str, str, str]]:
    """Name, number and kind of the base and then the increments; those before the first that is missing."""
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
    """Without a manifest: the one base and the one increment; with several of them the order is not known."""
    found = [match for path in sorted(folder.iterdir()) if (match := _PART.fullmatch(path.name)) is not None]
    parts = [(match[0], match[1], match[2][0]) for match in found]
    return parts if sorted(kind for _, _, kind in parts) in (["b"], ["b", "i"]) else []
