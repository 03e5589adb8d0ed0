"""A policy version as bytes: the safetensors format, laid out before any tensor is written, and a fast checksum.

The layout is known from names, dtypes and shapes alone. So a publisher writes each tensor once, to its final place, and
a reader maps the bytes instead of parsing them.

Invariants
- The same tensors make the same bytes: they are sorted by the size of their elements, which aligns them, and by name.
- The checksum, XXH3, is as fast as the memory on one processor, and does not hold the interpreter's lock. It detects
  damage; it is no signature.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from services.weights.errors import WeightsCorrupt

if TYPE_CHECKING:
    import torch

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
_CODES = {name: code for code, name in _DTYPES.items()}
_ALIGNMENT = 8


@dataclass(frozen=True)
class Layout:
    """Where each tensor of a version lies in its bytes.

    Attributes:
        header: length of the description (uint64, little-endian) and the description (JSON).
        nbytes: of header and tensors.

    Example: `b`, bfloat16 [3], and `a`, float32 [2].

        byte   0        8                               136     144      150
               length   {"a":{...},"b":{...}} padding   a       b        end
    """

    header: bytes
    nbytes: int

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> Layout:
        """The layout of these tensors; only their dtypes and shapes are read, so they may be on the meta device."""
        entries: dict[str, dict[str, object]] = {}
        end = 0
        for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
            begin, end = end, end + tensor.numel() * tensor.element_size()
            code = _CODES[str(tensor.dtype).removeprefix("torch.")]
            entries[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        header = len(text).to_bytes(8, "little") + text
        return cls(header, len(header) + end)

    def entries(self) -> Iterator[tuple[str, torch.dtype, list[int], int, int]]:
        """Name, dtype, shape, first byte and end of each tensor, in their order."""
        import torch

        start = len(self.header)
        for name, entry in json.loads(self.header[8:]).items():
            begin, end = entry["data_offsets"]
            yield name, getattr(torch, _DTYPES[entry["dtype"]]), entry["shape"], start + begin, start + end

    def write_header(self, payload: Payload) -> dict[str, torch.Tensor]:
        """Write the header into a payload of `nbytes` bytes; return the tensors to fill, as views of it by name."""
        payload[: len(self.header)] = np.frombuffer(self.header, dtype=np.uint8)
        return unpack(payload)


def pack(tensors: Mapping[str, torch.Tensor]) -> Payload:
    """Tensors on any device, in any layout in memory, as a payload of their own."""
    layout = Layout.of(tensors)
    payload = np.empty(layout.nbytes, dtype=np.uint8)
    fill(layout.write_header(payload), tensors.items())
    return payload


def in_buckets(tensors: Mapping[str, torch.Tensor], nbytes: int) -> Iterator[dict[str, torch.Tensor]]:
    """Cut tensors into buckets of at least `nbytes` bytes each, but for the last, in their order.

    Example: tensors of 100, 100, 300 and 20 MiB, buckets of 256 MiB: 100 + 100 + 300, and 20.
    """
    bucket: dict[str, torch.Tensor] = {}
    filled = 0
    for name, tensor in tensors.items():
        bucket[name] = tensor
        filled += tensor.nbytes
        if filled >= nbytes:
            yield bucket
            bucket, filled = {}, 0
    if bucket:
        yield bucket


def fill(places: Mapping[str, torch.Tensor], tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy each tensor to its place in a payload."""
    for name, tensor in tensors:
        places[name].copy_(tensor.detach())


def unpack(payload: Payload) -> dict[str, torch.Tensor]:
    """Parse a payload into tensors that are views of it and keep it alive. Those of a read-only payload must not be
    written: the process would crash.

    Raises:
        WeightsCorrupt: it is not a safetensors file.
    """
    try:
        header, start = _header(payload)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            return {name: _view(payload[start:], **entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise WeightsCorrupt(f"invalid safetensors payload: {error}") from None


def names_in(payload: Payload) -> list[str]:
    """Names of the tensors in a payload. Raises WeightsCorrupt."""
    try:
        return list(_header(payload)[0])
    except (ValueError, TypeError, AttributeError) as error:
        raise WeightsCorrupt(f"invalid safetensors payload: {error}") from None


def _header(payload: Payload) -> tuple[dict[str, Any], int]:
    """The description of a payload, by names of tensors, and where the tensors begin."""
    start = 8 + int.from_bytes(payload[:8].tobytes(), "little")
    header: dict[str, Any] = json.loads(payload[8:start].tobytes())
    header.pop("__metadata__", None)
    return header, start


class Checksum:
    """XXH3 of a payload that comes in pieces, 128 bits."""

    def __init__(self) -> None:
        import xxhash

        self._hash = xxhash.xxh3_128()

    def update(self, piece: memoryview) -> None:
        """Add the next piece."""
        self._hash.update(piece)

    def hex(self) -> str:
        """The checksum of all pieces so far, hexadecimal."""
        return self._hash.hexdigest()


def checksum(payload: Payload) -> str:
    """The `Checksum` of a whole payload, hexadecimal."""
    whole = Checksum()
    whole.update(payload.data)
    return whole.hex()


def _view(body: Payload, dtype: str, shape: list[int], data_offsets: list[int]) -> torch.Tensor:
    import torch

    begin, end = data_offsets
    kind: torch.dtype = getattr(torch, _DTYPES[dtype])
    count = math.prod(shape)
    if not 0 <= begin <= end <= body.nbytes or end - begin != count * kind.itemsize:
        raise ValueError(f"tensor of {count} {dtype} does not match bytes {begin} to {end}")
    if count == 0:
        return torch.empty(shape, dtype=kind)
    return torch.frombuffer(body.data, dtype=kind, count=count, offset=begin).reshape(shape)
