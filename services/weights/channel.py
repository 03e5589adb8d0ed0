"""What a weight channel is, and the payload that all of them carry: safetensors bytes with a BLAKE2b checksum.

Invariants
- A version is announced (`latest`) only when all of its payload can be had; `fetch` verifies the checksum.
- The newest version is the one published last, whatever its number: a learner that restarts from a checkpoint publishes
  older numbers again. A channel keeps the last two.
- Every call ends within the channel's time limit.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from services.errors import AnchorageError

if TYPE_CHECKING:
    import torch

KEPT_VERSIONS = 2

Payload = NDArray[np.uint8]

_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}


class WeightsError(AnchorageError):
    """Base of what can go wrong with a weight channel."""


class WeightsCorrupt(WeightsError):
    """The payload is not the one that was published."""


class WeightsGone(WeightsError):
    """The version is no longer kept; ask for the latest."""


class TransferLost(WeightsError):
    """A collective transfer did not begin: a member was missing. Nothing was touched; ask again."""


class WeightsUnavailable(WeightsError):
    """The channel did not answer in time, or cannot be written."""


@dataclass(frozen=True)
class WeightVersion:
    """An announced version: policy version, payload size in bytes, its checksum, and where its channel keeps it."""

    version: int
    nbytes: int
    checksum: str
    locator: str


class WeightChannel(ABC):
    """One publisher, any number of readers, early or late."""

    @abstractmethod
    def publish(self, version: int, tensors: Mapping[str, torch.Tensor]) -> WeightVersion:
        """Announce `tensors` (any device, any layout) as `version`, once all of it can be had.

        Raises:
            WeightsUnavailable: could not be stored in time; nothing is announced.
        """

    @abstractmethod
    def latest(self) -> WeightVersion | None:
        """The version published last, none before the first. Raises WeightsUnavailable, WeightsCorrupt."""

    @abstractmethod
    def fetch(self, wanted: WeightVersion) -> dict[str, torch.Tensor]:
        """The tensors of a version, on the CPU. They may be views of shared read-only memory: copy before writing.

        Raises:
            WeightsGone: newer versions have taken its place.
            WeightsCorrupt: the checksum does not match.
            WeightsUnavailable: not read in time.
        """

    def close_run(self) -> None:  # noqa: B027 - most channels leave nothing behind that is in the way
        """End what the run's weights keep alive beyond its processes. Nobody reads them any more."""

    def close(self) -> None:  # noqa: B027 - nothing to end in most channels
        """End what this process does for the channel; what is published stays where the channel keeps it."""


def checksum(payload: Payload) -> str:
    """BLAKE2b of the payload, 128 bits as hex."""
    return hashlib.blake2b(payload.data, digest_size=16).hexdigest()


def pack(tensors: Mapping[str, torch.Tensor]) -> Payload:
    """The tensors as safetensors bytes."""
    import safetensors.torch

    owned = {name: _owned(tensor.detach()) for name, tensor in tensors.items()}
    return np.frombuffer(safetensors.torch.save(owned), dtype=np.uint8)


def unpack(payload: Payload) -> dict[str, torch.Tensor]:
    """The tensors in safetensors bytes, as views of the payload, which they keep alive.

    Raises:
        WeightsCorrupt: the bytes are no safetensors file.
    """
    try:
        start = 8 + int.from_bytes(payload[:8].tobytes(), "little")
        header = json.loads(payload[8:start].tobytes())
        header.pop("__metadata__", None)
        return {name: _view(payload[start:], **entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise WeightsCorrupt(f"the payload is no safetensors file: {error}") from None


def verify(payload: Payload, wanted: WeightVersion) -> None:
    """Raises WeightsCorrupt unless the payload is the one of `wanted`."""
    if payload.nbytes != wanted.nbytes or checksum(payload) != wanted.checksum:
        raise WeightsCorrupt(f"the weights of version {wanted.version} are damaged: the checksum does not match")


def _owned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU, contiguous and alone in its storage: safetensors refuses shared ones (tied embeddings)."""
    copy = tensor.to("cpu").contiguous()
    return copy.clone() if copy.data_ptr() == tensor.data_ptr() else copy


def _view(body: Payload, dtype: str, shape: list[int], data_offsets: list[int]) -> torch.Tensor:
    import torch

    begin, end = data_offsets
    kind: torch.dtype = getattr(torch, _DTYPES[dtype])
    count = math.prod(shape)
    if not 0 <= begin <= end <= body.nbytes or end - begin != count * kind.itemsize:
        raise ValueError(f"a tensor of {count} {dtype} does not fit bytes {begin} to {end}")
    if count == 0:
        return torch.empty(shape, dtype=kind)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(body.data, dtype=kind, count=count, offset=begin).reshape(shape)
