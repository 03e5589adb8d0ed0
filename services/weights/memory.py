"""Files in memory that hold one version each: written by one process, mapped by others of the same node.

A file has no name in any file system: it lives as long as a process has it open, whoever made it. Others open it
through the descriptor of a process that has it (`MemoryName`), as the same user in the same container. Pages of a new
file cost ten times as much as writing to old ones; so a publisher writes its next version into a file that nobody
reads any more, and readers keep the last few files mapped.

Invariants
- Whoever reads a file, or keeps it for readers, holds a shared lock on it; it is written only under the exclusive lock.
  The kernel releases the locks of a process that dies.
- A reader verifies the checksum under its lock: a file that was rewritten before it had the lock is noticed.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import threading
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from services.weights.payload import Layout, Payload, unpack

if TYPE_CHECKING:
    import torch

_KEPT = 2
"""Files that a publisher keeps for its next versions, and files that a reader keeps mapped."""


@dataclass(frozen=True)
class MemoryName:
    """How a process of the same node opens a file.

    Attributes:
        path: of a descriptor of a process that has it open.
        inode: of the file; the descriptor may belong to another one by now.
        lasting: whether later versions will be in the same file, so that it is worth keeping mapped.
    """

    path: str
    inode: int
    lasting: bool


class Snapshot(Protocol):
    """Memory for the weights of one version, on the host or on a card."""

    def places(self, layout: Layout) -> dict[str, torch.Tensor]:
        """The tensors to fill, in the layout's order."""
        ...

    def unlock(self) -> None:
        """Called once all of them are filled: others may read them."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors, filled."""
        ...

    def keep(self) -> object:
        """Keep them from being written over as long as the returned object is referenced."""
        ...


class SnapshotPool(Protocol):
    """The memory of a publisher, for version after version."""

    def take(self, nbytes: int) -> Snapshot:
        """Memory of this size that nobody reads. Raises WeightsUnavailable."""
        ...


class MemoryFile:
    """A file that this process made and may write. Its memory is freed once no process has it open.

    Args:
        nbytes: its size.
        lasting: see `MemoryName`.

    Attributes:
        payload: its bytes, writable.
        name: for other processes, while this object is alive.
    """

    def __init__(self, nbytes: int, *, lasting: bool = False) -> None:
        self._descriptor = os.memfd_create("anchorage-weights")
        self._closing = weakref.finalize(self, os.close, self._descriptor)
        os.ftruncate(self._descriptor, nbytes)
        self.payload: Payload = np.frombuffer(mmap.mmap(self._descriptor, nbytes), dtype=np.uint8)
        self.name = _name(self._descriptor, lasting)

    def places(self, layout: Layout) -> dict[str, torch.Tensor]:
        """Write the header of a version; the tensors to fill, views of the payload."""
        return layout.write_header(self.payload)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that it holds, views of the payload. Raises WeightsCorrupt."""
        return unpack(self.payload)

    def keep(self) -> Opened:
        """A shared lock on it, which ends with the returned object."""
        return Opened(self.name)

    def lock(self) -> bool:
        """Take the exclusive lock. Returns whether that is possible: no other process has a lock."""
        return _locked(self._descriptor, fcntl.LOCK_EX)

    def unlock(self) -> None:
        """Release the lock."""
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        """Close it in this process. What is mapped stays readable as long as it is in use. Idempotent."""
        self._closing()


class MemoryPool:
    """The files of a publisher, for version after version."""

    def __init__(self) -> None:
        self._files: list[MemoryFile] = []

    def take(self, nbytes: int) -> MemoryFile:
        """A locked file of this size that nobody reads; a new one if there is none."""
        for file in [file for file in self._files if file.payload.nbytes != nbytes]:
            self._drop(file)
        for file in self._files:
            if file.lock():
                return file
        if len(self._files) == _KEPT:
            self._drop(self._files[0])  # a reader hangs on to it, and frees it
        file = MemoryFile(nbytes, lasting=True)
        file.lock()
        self._files.append(file)
        return file

    def _drop(self, file: MemoryFile) -> None:
        self._files.remove(file)
        file.close()


class Opened:
    """A file of another process that this one keeps open, under the shared lock.

    Attributes:
        name: for other processes, while this object is open.
        nbytes: size of the file.

    Raises:
        FileNotFoundError: it is gone, or being written.
    """

    def __init__(self, name: MemoryName) -> None:
        self.descriptor = _open(name)
        self._closing = weakref.finalize(self, os.close, self.descriptor)
        self.nbytes = os.fstat(self.descriptor).st_size
        self.name = _name(self.descriptor, name.lasting)
        if not self.lock():
            self.close()
            raise FileNotFoundError(f"{name.path} is being written")

    def lock(self) -> bool:
        """Take the shared lock. Returns whether that is possible: nobody writes."""
        return _locked(self.descriptor, fcntl.LOCK_SH)

    def unlock(self) -> None:
        """Release the lock."""
        with contextlib.suppress(OSError):  # closed
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        """Close it. Idempotent."""
        self._closing()


class Mappings:
    """The files that this process reads. Thread-safe. The last few stay mapped."""

    def __init__(self) -> None:
        self._known: dict[int, _Mapping] = {}
        self._lock = threading.Lock()

    def open(self, name: MemoryName) -> tuple[Payload, MemoryName]:
        """Map a file; it is locked until the returned bytes and all views of them are gone.

        Returns:
            Its bytes, read-only, and its name as this process has it open.

        Raises:
            OSError: it is gone, or being written.
        """
        with self._lock:
            known = self._known.pop(name.inode, None) or _Mapping(Opened(name))
            if name.lasting:
                self._known[name.inode] = known  # last, as the most recent
            while len(self._known) > _KEPT:
                self._known.pop(next(iter(self._known)))
            return known.view(), known.file.name


class _Mapping:
    def __init__(self, file: Opened) -> None:
        self.file = file
        self._map = mmap.mmap(file.descriptor, file.nbytes, prot=mmap.PROT_READ)
        self._readers = 0
        self._counting = threading.RLock()  # a view may end in the middle of `view`, by the garbage collector

    def view(self) -> Payload:
        with self._counting:
            if not self._readers and not self.file.lock():
                raise FileNotFoundError(f"{self.file.name.path} is being written")
            self._readers += 1
        view = np.frombuffer(self._map, dtype=np.uint8)
        weakref.finalize(view, self._end)
        return view

    def _end(self) -> None:
        with self._counting:
            self._readers -= 1
            if not self._readers:
                self.file.unlock()


def _name(descriptor: int, lasting: bool) -> MemoryName:
    return MemoryName(f"/proc/{os.getpid()}/fd/{descriptor}", os.fstat(descriptor).st_ino, lasting)


def _open(name: MemoryName) -> int:
    """Open a file read-only. Raises FileNotFoundError if its descriptor is closed, or another file's by now."""
    try:
        descriptor = os.open(name.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise FileNotFoundError(f"{name.path}: {error.strerror}") from error
    if os.fstat(descriptor).st_ino != name.inode:
        os.close(descriptor)
        raise FileNotFoundError(f"{name.path} is another file")
    return descriptor


def _locked(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
