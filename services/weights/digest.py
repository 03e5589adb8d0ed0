"""A checksum of tensors that is fast on any device, for weights that are never one file.

Each tensor is a number modulo 2**64: its words times their positions, summed by chunk. The digest is a BLAKE2b of all
names and numbers. It detects errors of transmission; it is not cryptographic. The numbers stay on the tensors' device
until the digest is asked for: adding a tensor of a GPU waits for nothing.

Example:
    int32 tensor [7, 0, 5]: 7·1 + 0·2 + 5·3 = 22
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_CHUNK = 4 * 2**20
_BLOCK = 2**18
"""On a CPU chunks are summed in blocks whose intermediate results stay in its cache."""


class Digest:
    """Accumulates tensors one by one. Their order is irrelevant, that of the words in a tensor is not."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Include a tensor of any shape and dtype, on any device."""
        import torch

        kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        words = tensor.detach().contiguous().view(-1).view(kinds[tensor.element_size()])
        places = torch.arange(1, min(words.numel(), _CHUNK) + 1, device=words.device)
        size = _BLOCK if words.device.type == "cpu" else _CHUNK
        total = torch.zeros((), dtype=torch.int64, device=words.device)
        for start in range(0, words.numel(), _CHUNK):
            total *= 31  # int64 wraps around: modulo 2**64
            blocks = torch.split(words[start : start + _CHUNK], size)
            for block, own in zip(blocks, torch.split(places, size), strict=False):
                total += (block.long() * own[: block.numel()]).sum()
        self._sums[name] = total

    def include(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Include several."""
        for name, tensor in tensors:
            self.add(name, tensor)

    def hex(self) -> str:
        """The digest of all tensors added so far, 32 hexadecimal digits."""
        text = "\n".join(f"{name} {int(total) % 2**64}" for name, total in sorted(self._sums.items()))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """The digest of named tensors, 32 hexadecimal digits."""
    found = Digest()
    found.include(tensors)
    return found.hex()
