"""Checksums of all files of a folder in its `manifest.json`, so that a damaged folder is detected before it is used.

Invariants
- The manifest is written last. When `write` returns, it and all files of the folder are durable.
- The manifest has its own checksum, which distinguishes a damaged manifest from a damaged file.
- An intact folder holds every listed file with its size and BLAKE3 hash, and no other file except hidden ones, so that
  files of another checkpoint among them are noticed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from services.errors import FolderDamaged
from services.files import sync, write_whole

MANIFEST_NAME = "manifest.json"
FORMAT = 1


def write(folder: Path, facts: Mapping[str, object]) -> None:
    """Write the manifest of `folder`, with JSON-able `facts` in it, and make all files durable. Raises OSError."""
    files = {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "blake3": _hash(file)} for file in _in(folder)
    }
    body: dict[str, object] = {"format": FORMAT, **facts, "files": files}
    write_whole(folder / MANIFEST_NAME, json.dumps(body | {"checksum": _checksum(body)}, indent=1))
    for path in sorted(folder.rglob("*")):
        sync(path)
    sync(folder)


def read(folder: Path) -> dict[str, Any]:
    """Read and verify the manifest itself, not its files.

    Raises:
        FolderDamaged: it is missing or damaged.
    """
    file = folder / MANIFEST_NAME
    try:
        body = json.loads(file.read_text())
        checksum = body.pop("checksum")
        files = body["files"]
        intact = checksum == _checksum(body) and isinstance(files, dict)
    except FileNotFoundError:
        raise FolderDamaged(f"{folder} is damaged: {MANIFEST_NAME} is missing") from None
    except OSError as error:
        raise FolderDamaged(f"cannot read {file}: {error.strerror}") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise FolderDamaged(f"{folder} is damaged: {MANIFEST_NAME} is not a manifest") from None
    if not intact:
        raise FolderDamaged(f"{folder} is damaged: {MANIFEST_NAME} has a wrong checksum")
    if body.get("format") != FORMAT:
        raise FolderDamaged(
            f"{folder} has a manifest of format {body.get('format')}, this version reads format {FORMAT}"
        )
    return dict(body)


def verify(folder: Path, only: str = "") -> dict[str, Any]:
    """Verify the files whose relative paths begin with `only`; the content of the manifest.

    Raises:
        FolderDamaged: names the first file that is missing, damaged, or not listed.
    """
    body = read(folder)
    found = {str(file.relative_to(folder)): file for file in _in(folder)}
    for name, wanted in body["files"].items():
        if not name.startswith(only):
            continue
        if name not in found:
            raise FolderDamaged(f"{folder} is damaged: {name} is missing")
        try:
            size = found[name].stat().st_size
            if size != wanted["bytes"]:
                raise FolderDamaged(f"{folder} is damaged: {name} has {size:,} bytes instead of {wanted['bytes']:,}")
            if _hash(found[name]) != wanted["blake3"]:
                raise FolderDamaged(f"{folder} is damaged: the content of {name} does not match its checksum")
        except OSError as error:
            raise FolderDamaged(f"cannot read {found[name]}: {error.strerror}") from None
    for name in found:
        if name.startswith(only) and name not in body["files"]:
            raise FolderDamaged(f"{folder} is damaged: {name} is not part of it")
    return body


def _in(folder: Path) -> Iterator[Path]:
    """Files of the folder, sorted by name, without the manifest, hidden files and hidden folders."""
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if not file.is_dir() and not hidden and file != folder / MANIFEST_NAME:
            yield file


def _checksum(body: Mapping[str, object]) -> str:
    from blake3 import blake3

    return blake3(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _hash(file: Path) -> str:
    from blake3 import blake3

    return blake3(max_threads=blake3.AUTO).update_mmap(file).hexdigest()
