"""An index in a folder: one `.npy` file per array and a manifest, opened by memory-mapping.

Invariants
- The folder appears complete or not at all: it is written under a temporary name beside the target and renamed.
- An index opens only if its checksums match. Checksums are computed by reading the files, not through the mapping, so
  that the process's own memory stays small; mapped pages belong to the page cache and are shared by all processes.
- No pickle.

Example:
    The two documents of the example in `postings`, built with the source "abc" (bytes):

    asins.npy 132   counts.npy 160      documents.npy 148   lengths.npy 136     index.json 316
    starts.npy 160  term_ends.npy 160   term_text.npy 143   saturations.npy 148

    index.json: {"format": "webshop search index", "version": 1, "source": "abc", "checksums": {"asins": 1338302956, …}}
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
"""Increment when the arrays, the analysis or the similarity change: an old index would return other results."""
_CHUNK = 1 << 20


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder; on success it is renamed to `folder`, on an error it is removed.

    Raises:
        SearchIndexError: `folder` exists or is not writable.

    Example:
        with new_folder(Path("index")) as partial:    # .index.partial-x3k9q2_f
            (partial / "asins.npy").write_bytes(...)  # an exception here leaves nothing behind
    """
    if folder.exists():
        raise _exists(folder)
    with _writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp gives access to the owner only, but servers of another user may share the index
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
    return SearchIndexError(f"folder already exists: {folder}; remove it, or build the search index elsewhere")


class RunFolder:
    """Stores runs of postings in files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0

    def keep(self, run: Packed) -> Packed:
        """Write a run to a file and return it memory-mapped."""
        path = self._folder / f"run-{self._count}.npy"
        self._count += 1
        with _writing(path):
            np.save(path, run)
        return _map(path)


def allocate_in(folder: Path, name: str, kind: np.dtype[Any], size: int) -> NDArray[Any]:
    """Return a writable array that is mapped to its file.

    Disk space is allocated here, so that a full disk raises an error; otherwise a later write would raise SIGBUS.
    """
    path = _path(folder, name)
    with _writing(path):
        filled = np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=(size,))  # type: ignore[no-untyped-call]
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return np.asarray(filled)


def seal(folder: Path, source: str) -> None:
    """Write the manifest, which marks the arrays as complete and records `source`."""
    with _writing(folder):
        checksums = {name: _checksum(_path(folder, name)) for name in TYPES}
        manifest = {"format": FORMAT, "version": VERSION, "source": source, "checksums": checksums}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def load(folder: Path, source: str | None) -> Postings:
    """Memory-map the arrays of a folder. If `source` is given, the index must have the same one.

    Raises:
        SearchIndexError: the folder holds no index of this version and source, or the index is damaged.
    """
    manifest = _manifest(folder)
    if source is not None and manifest.get("source") != source:
        raise SearchIndexError(f"the search index {folder} was built from other products: remove it and build it again")
    recorded = manifest.get("checksums")
    checksums = recorded if isinstance(recorded, dict) else {}
    arrays: dict[str, NDArray[Any]] = {}
    for name, kind in TYPES.items():
        path = _path(folder, name)
        try:
            if _checksum(path) != checksums.get(name):
                raise ValueError("checksum mismatch")
            arrays[name] = _map(path)
            if arrays[name].ndim != 1 or not arrays[name].dtype.str.startswith(kind.replace("S", "|S")):
                raise ValueError(f"invalid type {arrays[name].dtype.str}")
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
        raise SearchIndexError(f"not a search index: {folder} has no readable {MANIFEST}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise SearchIndexError(f"not a search index: {folder} has a {MANIFEST} of another format")
    if manifest.get("version") != VERSION:
        raise SearchIndexError(
            f"the search index {folder} has version {manifest.get('version')}, expected {VERSION}: build it again"
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
    """Return the size of an index on disk, in bytes."""
    return sum(os.stat(path).st_size for path in folder.iterdir())
