"""Interface of weight channels and their common payload: safetensors bytes with a BLAKE2b checksum.

Invariants
- A version is announced (`latest`) only once its whole payload is available. `fetch` verifies the checksum.
- The newest version is the one published last, whatever its number: a learner that restarts from a checkpoint publishes
  older numbers again. A channel keeps the last two.
- Every call ends within the channel's timeout.
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
    """Base of the errors of weight channels."""


class WeightsCorrupt(WeightsError):
    """The payload differs from the published one."""


class WeightsGone(WeightsError):
    """The version is no longer kept; fetch the latest instead."""


class TransferLost(WeightsError):
    """A collective transfer did not begin because a member was missing. Nothing has changed; request it again."""


class WeightsUnavailable(WeightsError):
    """The channel did not respond in time, or cannot be written."""


@dataclass(frozen=True)
class WeightVersion:
    """An announced version.

    Attributes:
        version: policy version, the number of updates.
        nbytes: size of the payload.
        checksum: of the payload, hexadecimal.
        locator: where the channel keeps it.
    """

    version: int
    nbytes: int
    checksum: str
    locator: str


class WeightChannel(ABC):
    """One publisher, any number of readers, early or late."""

    @abstractmethod
    def publish(self, version: int, tensors: Mapping[str, torch.Tensor]) -> WeightVersion:
        """Store `tensors` and announce them as `version`.

        Args:
            version: policy version.
            tensors: by Hugging Face name, on any device, in any layout.

        Raises:
            WeightsUnavailable: not stored in time; nothing is announced.
        """

    @abstractmethod
    def latest(self) -> WeightVersion | None:
        """The version published last, None before the first. Raises WeightsUnavailable, WeightsCorrupt."""

    @abstractmethod
    def fetch(self, wanted: WeightVersion) -> dict[str, torch.Tensor]:
        """Read the tensors of a version into host memory. They may be read-only shared views: copy before writing.

        Raises:
            WeightsGone: newer versions have replaced it.
            WeightsCorrupt: the checksum does not match.
            WeightsUnavailable: not read in time.
        """

    def close_run(self) -> None:  # noqa: B027 - most channels have nothing to release
        """Release what the run's weights keep alive beyond its processes, once there is no reader any more."""

    def close(self) -> None:  # noqa: B027 - most channels have nothing to release
        """Release what this process holds of the channel. Published versions stay."""


def checksum(payload: Payload) -> str:
    """BLAKE2b of the payload, 128 bits as hex."""
    return hashlib.blake2b(payload.data, digest_size=16).hexdigest()


def pack(tensors: Mapping[str, torch.Tensor]) -> Payload:
    """Serialize tensors as safetensors bytes."""
    import safetensors.torch

    owned = {name: _owned(tensor.detach()) for name, tensor in tensors.items()}
    return np.frombuffer(safetensors.torch.save(owned), dtype=np.uint8)


def unpack(payload: Payload) -> dict[str, torch.Tensor]:
    """Parse safetensors bytes into tensors that are views of the payload and keep it alive.

    Raises:
        WeightsCorrupt: invalid safetensors bytes.
    """
    try:
        start = 8 + int.from_bytes(payload[:8].tobytes(), "little")
        header = json.loads(payload[8:start].tobytes())
        header.pop("__metadata__", None)
        return {name: _view(payload[start:], **entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise WeightsCorrupt(f"invalid safetensors payload: {error}") from None


def verify(payload: Payload, wanted: WeightVersion) -> None:
    """Raise WeightsCorrupt unless size and checksum of the payload are those of `wanted`."""
    if payload.nbytes != wanted.nbytes or checksum(payload) != wanted.checksum:
        raise WeightsCorrupt(f"weights of version {wanted.version} are damaged: size or checksum mismatch")


def _owned(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy on the CPU in its own storage: safetensors rejects shared storage (tied embeddings)."""
    copy = tensor.to("cpu").contiguous()
    return copy.clone() if copy.data_ptr() == tensor.data_ptr() else copy


def _view(body: Payload, dtype: str, shape: list[int], data_offsets: list[int]) -> torch.Tensor:
    import torch

    begin, end = data_offsets
    kind: torch.dtype = getattr(torch, _DTYPES[dtype])
    count = math.prod(shape)
    if not 0 <= begin <= end <= body.nbytes or end - begin != count * kind.itemsize:
        raise ValueError(f"tensor of {count} {dtype} does not match bytes {begin} to {end}")
    if count == 0:
        return torch.empty(shape, dtype=kind)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(body.data, dtype=kind, count=count, offset=begin).reshape(shape)
