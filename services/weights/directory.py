"""Weight channel through a folder that publisher and readers share; needs no Ray.

A version is one safetensors file, named by version and checksum, so that publishing a number again never changes a file
that is being read. `latest.json` lists the kept versions, newest first.

Invariants
- Files and `latest.json` appear whole and durable (`services.files.replacing`).
- A file is removed only after `latest.json` no longer lists it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
from pydantic import TypeAdapter, ValidationError

from services.files import PARTIAL, replacing
from services.weights.channel import (
    INITIAL,
    KEPT_VERSIONS,
    Delivery,
    StoringChannel,
    WeightVersion,
    in_memory,
    new_file,
)
from services.weights.errors import WeightsCorrupt, WeightsGone, WeightsUnavailable
from services.weights.fence import Fence
from services.weights.memory import Snapshot
from services.weights.payload import Checksum, Payload, checksum

_LATEST = "latest.json"
_SUFFIX = ".safetensors"
_CHUNK_BYTES = 16 * 2**20
_KEPT = TypeAdapter(list[WeightVersion])


class DirectoryChannel(StoringChannel):
    """Weight channel with one publisher at a time and any number of readers.

    Args:
        folder: that all of them reach.
        timeout_s: timeout of every call, in seconds.
        fence: of the publisher; None: nobody else can own the run, and for readers.
    """

    def __init__(self, folder: Path, timeout_s: float, fence: Fence | None = None) -> None:
        super().__init__(folder, timeout_s, fence)
        self._folder = folder
        self._timeout_s = timeout_s
        self._fence = fence

    def announce_initial(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._list(INITIAL, time.monotonic() + self._timeout_s)
        except OSError as error:
            raise WeightsUnavailable(f"cannot write to {self._folder}: {error.strerror}") from None

    def send(self, version: int, snapshot: Snapshot, digest: str | None = None) -> WeightVersion:
        file = in_memory(snapshot)
        deadline = time.monotonic() + self._timeout_s
        found = checksum(file.payload)
        published = WeightVersion(version, file.payload.nbytes, found, f"{version:08d}-{found[:16]}{_SUFFIX}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._write(published.locator, file.payload, deadline)
            self._prune(self._list(published, deadline))
        except OSError as error:
            raise WeightsUnavailable(
                f"cannot write weights of version {version} to {self._folder}: {error.strerror}"
            ) from None
        return published

    def _list(self, published: WeightVersion, deadline: float) -> list[WeightVersion]:
        """Announce a version as the newest. Returns all that are kept."""
        earlier = [kept for kept in self._kept() if kept.locator != published.locator]
        kept = [published, *earlier][:KEPT_VERSIONS]
        if self._fence is not None:
            self._fence.check()
        self._write(_LATEST, np.frombuffer(_KEPT.dump_json(kept), dtype=np.uint8), deadline)
        return kept

    def latest(self) -> WeightVersion | None:
        try:
            kept = self._kept()
        except OSError as error:
            raise WeightsUnavailable(f"cannot read {self._folder / _LATEST}: {error.strerror}") from None
        return kept[0] if kept else None

    def bring(self, wanted: WeightVersion) -> Delivery:
        deadline = time.monotonic() + self._timeout_s
        try:
            return self._read(wanted, deadline)
        except FileNotFoundError:
            raise WeightsGone(f"weights of version {wanted.version} are no longer in {self._folder}") from None
        except OSError as error:
            raise WeightsUnavailable(
                f"cannot read weights of version {wanted.version} from {self._folder}: {error.strerror}"
            ) from None

    def _kept(self) -> list[WeightVersion]:
        try:
            return _KEPT.validate_json((self._folder / _LATEST).read_bytes())
        except FileNotFoundError:
            return []
        except ValidationError:
            raise WeightsCorrupt(f"{self._folder / _LATEST} is damaged; remove it and publish again") from None

    def _write(self, name: str, payload: Payload, deadline: float) -> None:
        with replacing(self._folder / name, durable=True) as file:
            for start in range(0, payload.nbytes, _CHUNK_BYTES):
                file.write(payload[start : start + _CHUNK_BYTES].data)
                if time.monotonic() > deadline:
                    self._late(name)

    def _read(self, wanted: WeightVersion, deadline: float) -> Delivery:
        """Read and verify the payload, into memory of its own: a mapped file could be removed while it is read."""
        path = self._folder / wanted.locator
        found = Checksum()
        with path.open("rb") as source:
            if os.fstat(source.fileno()).st_size != wanted.nbytes:
                raise WeightsCorrupt(f"{path} is damaged: size mismatch")
            file = new_file(wanted.nbytes)
            for start in range(0, wanted.nbytes, _CHUNK_BYTES):
                chunk = file.payload[start : start + _CHUNK_BYTES].data
                if source.readinto(chunk) != len(chunk):
                    raise WeightsCorrupt(f"{path} is damaged: size mismatch")
                found.update(chunk)
                if time.monotonic() > deadline:
                    self._late(wanted.locator)
        if found.hex() != wanted.checksum:
            raise WeightsCorrupt(f"{path} is damaged: checksum mismatch")
        return Delivery(wanted, file.payload, file.name, file)

    def _prune(self, kept: Sequence[WeightVersion]) -> None:
        named = {version.locator for version in kept}
        for path in [*self._folder.glob(f"*{_SUFFIX}"), *self._folder.glob(f".*{PARTIAL}")]:
            if path.name not in named:
                path.unlink(missing_ok=True)

    def _late(self, name: str) -> NoReturn:
        raise WeightsUnavailable(
            f"{self._folder / name} took longer than weights.timeout_s ({self._timeout_s:.0f} s); raise it"
        )
