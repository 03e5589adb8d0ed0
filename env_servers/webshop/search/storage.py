"""An index in a folder: one `.npy` file an array and a manifest, read by memory-mapping.

Invariants
- The folder appears whole or not at all: it is written under another name beside it and renamed when it is complete.
- What is opened has the checksums that were written. Files are checked by reading, so that a process's own memory
  stays small; the mapped pages are the operating system's and shared by all processes.
- No pickle.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from env_servers.webshop.search.postings import TYPES, Packed, Postings, SearchIndexError

MANIFEST = "index.json"
FORMAT = "webshop search index"
VERSION = 1
"""Changes with the arrays, the analysis and the similarity: any of them makes an index answer otherwise."""
_CHUNK = 1 << 20


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `folder` when the block ends well and is removed when it does not.

    Raises:
        SearchIndexError: `folder` is there already, or cannot be written.
    """
    if folder.exists():
        raise _exists(folder)
    with _writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp's is for its owner alone, but another user's servers may share the index
        try:
            partial.rename(folder)
        except OSError as error:
            if folder.exists():
                raise _exists(folder) from error
            raise _not_written(folder, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _not_written(path, error) from error


def _not_written(path: Path, error: OSError) -> SearchIndexError:
    return SearchIndexError(f"cannot write the search index at {path}: {error.strerror}")


def _exists(folder: Path) -> SearchIndexError:
    return SearchIndexError(f"{folder} is there already: remove it, or build the search index elsewhere")


class RunFolder:
    """Keeps runs of postings in files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0

    def keep(self, run: Packed) -> Packed:
        """Put a run into a file and map it."""
        path = self._folder / f"run-{self._count}.npy"
        self._count += 1
        with _writing(path):
            np.save(path, run)
        return _map(path)


def allocate_in(folder: Path, name: str, kind: np.dtype[Any], size: int) -> NDArray[Any]:
    """An array that is filled in its file. Its room on the disk is taken now: a full disk is an error, not a signal."""
    path = _path(folder, name)
    with _writing(path):
        filled = np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=(size,))  # type: ignore[no-untyped-call]
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return np.asarray(filled)


def seal(folder: Path, source: str) -> None:
    """Write the manifest: the arrays are complete, and made of the documents that `source` stands for."""
    with _writing(folder):
        checksums = {name: _checksum(_path(folder, name)) for name in TYPES}
        manifest = {"format": FORMAT, "version": VERSION, "source": source, "checksums": checksums}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def load(folder: Path, source: str | None) -> Postings:
    """Map the arrays of a folder; they must be of `source` where that is given.

    Raises:
        SearchIndexError: there is no index of this version and source in the folder, or it is damaged.
    """
    manifest = _manifest(folder)
    if source is not None and manifest.get("source") != source:
        raise SearchIndexError(f"the search index {folder} is of other products: remove it and build it again")
    recorded = manifest.get("checksums")
    checksums = recorded if isinstance(recorded, dict) else {}
    arrays: dict[str, NDArray[Any]] = {}
    for name, kind in TYPES.items():
        path = _path(folder, name)
        try:
            if _checksum(path) != checksums.get(name):
                raise ValueError("its checksum is another than the recorded one")
            arrays[name] = _map(path)
            if arrays[name].ndim != 1 or not arrays[name].dtype.str.startswith(kind.replace("S", "|S")):
                raise ValueError(f"it holds {arrays[name].dtype.str}")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise SearchIndexError(
                f"the search index {folder} is damaged: {path.name}: {reason}; remove the folder and build it again"
            ) from error
    return Postings(**arrays)


def _manifest(folder: Path) -> dict[str, object]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise SearchIndexError(f"{folder} is no search index: it has no readable {MANIFEST}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise SearchIndexError(f"{folder} is no search index: its {MANIFEST} is of something else")
    if manifest.get("version") != VERSION:
        raise SearchIndexError(
            f"the search index {folder} is of version {manifest.get('version')}, this is {VERSION}: build it again"
        )
    return manifest


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}.npy"


def _map(path: Path) -> NDArray[Any]:
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


def _checksum(path: Path) -> int:
    total = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            total = zlib.crc32(chunk, total)
    return total


def size_of(folder: Path) -> int:
    """Bytes of the files of an index."""
    return sum(os.stat(path).st_size for path in folder.iterdir())
