"""The groups that a run was trained on, kept in its folder for people to look at: `groups/000012.bin`, one an update.

Layout: the magic `ANG`, one byte of schema version, the index's length (uint32, little-endian), the index (one zstd
frame around a msgpack document), then the trajectories as `services.codec` writes them, one after the other.

Invariants
- What is kept are the very numbers that the learner trained with; nothing here computes an advantage.
- A file is whole or not there. The newest updates stay within the cap; the oldest files go first.
- The archive is a record, not a part of training: that it cannot be written is logged and stops nothing.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgpack
import numpy as np
import zstandard
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from services.codec import CodecError, decode, encode
from services.errors import AnchorageError
from services.files import write_whole
from services.schemas import Task, Trajectory

FOLDER_NAME = "groups"
SCHEMA_VERSION = 1
MAX_INDEX_BYTES = 256 * 2**20

_HEADER = b"ANG" + bytes([SCHEMA_VERSION])
_LENGTH = struct.Struct("<I")

_log = logging.getLogger(__name__)

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]


class ArchiveDamaged(AnchorageError, ValueError):
    """A file of the archive cannot be read as one."""


@dataclass(frozen=True, slots=True)
class StepNumbers:
    """What the learner computed for the S steps of one trajectory.

    Attributes:
        step_group: int64 [S], equal numbers are one step group; unique within an update.
        returns: float64 [S], discounted return of each step, the penalty on invalid actions subtracted.
        episode / step / total: float64 [S], advantages of the two levels, and what the policy was trained with.
    """

    step_group: Ids
    returns: Floats
    episode: Floats
    step: Floats
    total: Floats


@dataclass(frozen=True, slots=True)
class GroupRecord:
    """One group as it was trained on: its trajectories in member order, and the numbers of each."""

    group: int
    trajectories: Sequence[Trajectory]
    numbers: Sequence[StepNumbers]


class EpisodeSummary(BaseModel):
    """What lists and filters need of one trajectory."""

    member: int
    won: bool
    reward: float
    steps: int
    valid_steps: int
    response_tokens: int
    oldest_version: int
    newest_version: int
    actor: str


class MemberEntry(EpisodeSummary):
    """One trajectory in an index: what it came to, its numbers, and where its document lies."""

    model_config = ConfigDict(extra="forbid", strict=True)

    offset: int
    size: int
    numbers: bytes


class GroupEntry(BaseModel):
    """One group in an index."""

    model_config = ConfigDict(extra="forbid", strict=True)

    group: int
    task: Task
    task_type: str
    members: list[MemberEntry]


class Index(BaseModel):
    """What a file of the archive holds: the groups that policy update number `update` trained on."""

    model_config = ConfigDict(extra="forbid", strict=True)

    update: int
    groups: list[GroupEntry]


class GroupArchive:
    """Writes the archive of a run. For the one process that trains."""

    def __init__(self, folder: Path, cap_bytes: int) -> None:
        """`cap_bytes` 0 keeps nothing."""
        self._folder = folder / FOLDER_NAME
        self._cap_bytes = cap_bytes

    def append(self, update: int, groups: Sequence[GroupRecord]) -> None:
        """Keep the groups of an update. What cannot be kept is logged."""
        if not self._cap_bytes:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._folder / f"{update:06d}.bin", _encode(update, groups))
            self._trim()
        except (OSError, CodecError) as error:
            _log.warning("the groups of update %d are not kept for the dashboard: %s", update, error)

    def cut(self, update: int) -> None:
        """Forget what came after `update`: the run does it again."""
        for path in files(self._folder.parent):
            if int(path.stem) > update:
                path.unlink(missing_ok=True)

    def _trim(self) -> None:
        sizes = {path: path.stat().st_size for path in files(self._folder.parent)}
        total = sum(sizes.values())
        for path in list(sizes)[:-1]:
            if total <= self._cap_bytes:
                return
            path.unlink(missing_ok=True)
            total -= sizes[path]


def files(run: Path) -> list[Path]:
    """The archive's files in a run's folder, oldest update first."""
    folder = run / FOLDER_NAME
    return sorted(path for path in folder.glob("*.bin") if path.stem.isdecimal()) if folder.is_dir() else []


def read_index(path: Path) -> Index:
    """What the file holds, without its trajectories.

    Raises:
        ArchiveDamaged: not a file of the archive.
        OSError: it cannot be read; FileNotFoundError when it has left meanwhile.
    """
    with path.open("rb") as file:
        frame = file.read(_index_length(file, path))
    try:
        raw = zstandard.ZstdDecompressor().decompress(frame, max_output_size=MAX_INDEX_BYTES, allow_extra_data=False)
        return Index.model_validate(msgpack.unpackb(raw), strict=True)
    except (zstandard.ZstdError, ValidationError, ValueError, TypeError, msgpack.UnpackException) as error:
        raise ArchiveDamaged(f"{path.name} is damaged: {' '.join(str(error).split())[:200]}") from None


def read_trajectory(path: Path, entry: MemberEntry) -> Trajectory:
    """The trajectory of an entry of the file's index.

    Raises:
        ArchiveDamaged, OSError: as `read_index`.
    """
    with path.open("rb") as file:
        file.seek(_index_length(file, path) + entry.offset, os.SEEK_CUR)
        document = file.read(entry.size)
    try:
        return decode(document)
    except CodecError as error:
        raise ArchiveDamaged(f"{path.name} is damaged: {error}") from None


def numbers_of(entry: MemberEntry) -> StepNumbers:
    """The numbers of an entry's steps.

    Raises:
        ArchiveDamaged: they are not those of its steps.
    """
    if len(entry.numbers) != 5 * 8 * entry.steps:
        raise ArchiveDamaged(f"{len(entry.numbers)} bytes of numbers for {entry.steps} steps")
    table = np.frombuffer(entry.numbers, dtype="<f8").reshape(5, entry.steps)
    return StepNumbers(table[0].astype(np.int64), *table[1:].astype(np.float64))


def _index_length(file: BinaryIO, path: Path) -> int:
    """Bytes of the index, which begins where `file` stands afterwards. Raises ArchiveDamaged without a header."""
    head = file.read(len(_HEADER) + _LENGTH.size)
    if len(head) < len(_HEADER) + _LENGTH.size or not head.startswith(_HEADER):
        raise ArchiveDamaged(f"{path.name} is not an archive of groups of schema version {SCHEMA_VERSION}")
    length: int = _LENGTH.unpack_from(head, len(_HEADER))[0]
    return length


def _encode(update: int, groups: Sequence[GroupRecord]) -> bytes:
    documents: list[bytes] = []
    offset = 0
    entries: list[dict[str, Any]] = []
    for record in groups:
        members = []
        for trajectory, numbers in zip(record.trajectories, record.numbers, strict=True):
            document = encode(trajectory)
            members.append(_member(trajectory, numbers, offset, len(document)))
            documents.append(document)
            offset += len(document)
        entries.append(_group(record, members))
    index = zstandard.ZstdCompressor(write_checksum=True).compress(msgpack.packb({"update": update, "groups": entries}))
    return b"".join([_HEADER, _LENGTH.pack(len(index)), index, *documents])


def _group(record: GroupRecord, members: list[dict[str, Any]]) -> dict[str, Any]:
    first = record.trajectories[0]
    return {
        "group": record.group,
        "task": first.ticket.task.model_dump(),
        "task_type": str(first.facts.get("task_type", "")),
        "members": members,
    }


def _member(trajectory: Trajectory, numbers: StepNumbers, offset: int, size: int) -> dict[str, Any]:
    columns = (numbers.step_group, numbers.returns, numbers.episode, numbers.step, numbers.total)
    return {
        "member": trajectory.ticket.member,
        "offset": offset,
        "size": size,
        "won": trajectory.won,
        "reward": trajectory.reward,
        "steps": len(trajectory.steps),
        "valid_steps": sum(step.valid for step in trajectory.steps),
        "response_tokens": trajectory.response_tokens,
        "oldest_version": trajectory.oldest_version,
        "newest_version": max(span.version for step in trajectory.steps for span in step.versions),
        "actor": trajectory.actor,
        "numbers": np.stack(columns).astype("<f8").tobytes(),
    }
