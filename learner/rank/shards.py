"""Named tensors in numbered safetensors files, written one after the other.

Invariants
- At most about `SHARD_BYTES` of tensors are held in memory, both when writing and when reading.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

SHARD_BYTES = 2 * 2**30


class ShardWriter:
    """Writes `state-00001.safetensors` and so on into a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._waiting: dict[str, Tensor] = {}
        self._bytes = 0
        self._files = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor under a new name. Raises OSError if a file cannot be written."""
        self._waiting[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self._bytes += tensor.nbytes
        if self._bytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the tensors held in memory. Raises OSError."""
        from safetensors.torch import save_file

        if not self._waiting:
            return
        self._files += 1
        save_file(self._waiting, self._folder / f"state-{self._files:05d}.safetensors")
        self._waiting, self._bytes = {}, 0


class ShardReader:
    """Reads what `ShardWriter` wrote into a folder."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        files: list[Any] = [safe_open(path, framework="pt") for path in sorted(folder.glob("state-*.safetensors"))]
        self._places = {name: file for file in files for name in file.keys()}  # noqa: SIM118

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._places)

    def get(self, name: str) -> Tensor:
        """Read one tensor. Raises KeyError if there is none of that name."""
        tensor: Tensor = self._places[name].get_tensor(name)
        return tensor
