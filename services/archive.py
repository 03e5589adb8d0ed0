"""Archive of the groups that a run was trained on, for people to inspect: `groups/000012.bin`, one file per update.

    b"ANG"   version   length   index                             trajectories
    3 bytes  1 byte    uint32   zstd frame of a msgpack document  as `services.codec` encodes them, one after the other

`length` (little-endian) is that of the index, whose entries hold the offset and size of each trajectory after it.

Invariants
- The archive holds the very numbers that the learner trained with; nothing here computes an advantage.
- A file is complete or absent. The newest updates stay within the cap; the oldest files are removed first.
- The archive is a record, not part of training: if it cannot be written, this is logged and training continues.
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
    """A file of the archive is damaged."""


@dataclass(frozen=True, slots=True)
class StepNumbers:
    """What the learner computed for the S steps of one trajectory. Calls of one turn have the same numbers.

    Attributes:
        step_group: int64 [S], number of each step's step group, unique within an update; −1 for an untrained step.
        returns: float64 [S], discounted return of each step's turn, less the penalty on invalid actions; NaN, as the
            next three, for an untrained step.
        episode: float64 [S], advantage at the level of episodes.
        step: float64 [S], advantage at the level of steps.
        total: float64 [S], the advantage that the policy was trained with.
        turn: int64 [S], number of each step's turn in the episode; −1 for an untrained step. None: each step is a turn.
    """

    step_group: Ids
    returns: Floats
    episode: Floats
    step: Floats
    total: Floats
    turn: Ids | None = None

    @property
    def turns(self) -> Ids:
        """int64 [S], number of each step's turn in the episode; −1 for an untrained step."""
        return np.arange(len(self.total)) if self.turn is None else self.turn

    @property
    def first_calls(self) -> Ids:
        """int64 [turns], the step that opened each turn."""
        numbers, steps = np.unique(self.turns, return_index=True)
        return steps[numbers >= 0]


@dataclass(frozen=True, slots=True)
class GroupRecord:
    """One group as it was trained on.

    Attributes:
        group: its number.
        trajectories: in member order.
        numbers: of each trajectory.
    """

    group: int
    trajectories: Sequence[Trajectory]
    numbers: Sequence[StepNumbers]


class EpisodeSummary(BaseModel):
    """The figures of one trajectory that lists and filters need."""

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
    """One trajectory in an index.

    Attributes:
        offset: of its document, in bytes after the index.
        size: of its document, in bytes.
        numbers: its `StepNumbers`, five float64 vectors of S entries each, little-endian.
        turns: turn of each step, int32 [S], little-endian; empty where each step is a turn.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    offset: int
    size: int
    numbers: bytes
    turns: bytes = b""


class GroupEntry(BaseModel):
    """One group in an index."""

    model_config = ConfigDict(extra="forbid", strict=True)

    group: int
    task: Task
    task_type: str
    members: list[MemberEntry]


class Index(BaseModel):
    """The index of a file: the groups that policy update number `update` trained on."""

    model_config = ConfigDict(extra="forbid", strict=True)

    update: int
    groups: list[GroupEntry]


class GroupArchive:
    """Writes the archive of a run. Only the process that trains may use it."""

    def __init__(self, folder: Path, cap_bytes: int) -> None:
        """`cap_bytes`: size of the archive at most; 0 archives nothing."""
        self._folder = folder / FOLDER_NAME
        self._cap_bytes = cap_bytes

    def append(self, update: int, groups: Sequence[GroupRecord]) -> None:
        """Archive the groups of an update. A failure is logged, never raised."""
        if not self._cap_bytes:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._folder / f"{update:06d}.bin", _encode(update, groups))
            self._trim()
        except (OSError, CodecError) as error:
            _log.warning("cannot archive the groups of update %d: %s", update, error)

    def cut(self, update: int) -> None:
        """Remove the files of updates after `update`, which the run will repeat."""
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
    """Files of the archive in a run's folder, oldest update first."""
    folder = run / FOLDER_NAME
    return sorted(path for path in folder.glob("*.bin") if path.stem.isdecimal()) if folder.is_dir() else []


def read_index(path: Path) -> Index:
    """Read the index of a file, without its trajectories.

    Raises:
        ArchiveDamaged: not a file of the archive.
        OSError: it cannot be read; FileNotFoundError if it was removed meanwhile.
    """
    with path.open("rb") as file:
        frame = file.read(_index_length(file, path))
    try:
        raw = zstandard.ZstdDecompressor().decompress(frame, max_output_size=MAX_INDEX_BYTES, allow_extra_data=False)
        return Index.model_validate(msgpack.unpackb(raw), strict=True)
    except (zstandard.ZstdError, ValidationError, ValueError, TypeError, msgpack.UnpackException) as error:
        raise ArchiveDamaged(f"{path.name} is damaged: {' '.join(str(error).split())[:200]}") from None


def read_trajectory(path: Path, entry: MemberEntry) -> Trajectory:
    """Read the trajectory of an entry of the file's index.

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
    """Decode the numbers of an entry's steps.

    Raises:
        ArchiveDamaged: their size does not match the number of steps.
    """
    if entry.turns and len(entry.turns) != 4 * entry.steps:
        raise ArchiveDamaged(f"{entry.steps} steps need {4 * entry.steps} bytes of turns, got {len(entry.turns)}")
    turn = np.frombuffer(entry.turns, dtype="<i4").astype(np.int64) if entry.turns else None
    if len(entry.numbers) != 5 * 8 * entry.steps:
        raise ArchiveDamaged(
            f"{entry.steps} steps need {5 * 8 * entry.steps} bytes of numbers, got {len(entry.numbers)}"
        )
    step_group, returns, episode, step, total = np.frombuffer(entry.numbers, "<f8").reshape(5, -1).astype(np.float64)
    return StepNumbers(step_group.astype(np.int64), returns, episode, step, total, turn)


def _index_length(file: BinaryIO, path: Path) -> int:
    """Read the header; the length of the index, which begins at the new position. ArchiveDamaged without a header."""
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
    own_turns = np.array_equal(numbers.turns, np.arange(len(trajectory.steps)))
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
        **({} if own_turns else {"turns": numbers.turns.astype("<i4").tobytes()}),
    }
