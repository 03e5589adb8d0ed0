from __future__ import annotations

import numpy as np
import pytest
import safetensors.torch
import torch

from services.weights import WeightsCorrupt
from services.weights.payload import Checksum, Layout, checksum, names_in, pack, unpack


def tensors() -> dict[str, torch.Tensor]:
    return {
        "half": torch.arange(3).to(torch.bfloat16),
        "bytes": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "double": torch.tensor([1.5, 2.5], dtype=torch.float64),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 4),
        "flag": torch.tensor([True, False, True]),
    }


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert (one[name].dtype, one[name].shape) == (other[name].dtype, other[name].shape)
        assert torch.equal(one[name], other[name]), name


def test_a_payload_is_a_safetensors_file() -> None:
    assert_same(safetensors.torch.load(pack(tensors()).tobytes()), tensors())


def test_safetensors_files_are_payloads() -> None:
    file = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors().items()})
    assert_same(unpack(np.frombuffer(file, dtype=np.uint8)), tensors())


def test_tensors_are_aligned_and_their_places_known_without_their_values() -> None:
    meta = {name: tensor.to("meta") for name, tensor in tensors().items()}
    layout = Layout.of(meta)
    assert layout == Layout.of(tensors())
    places = layout.write_header(np.zeros(layout.nbytes + 8, dtype=np.uint8)[: layout.nbytes])
    assert all(place.data_ptr() % place.element_size() == 0 for place in places.values())
    assert pack(tensors()).nbytes == layout.nbytes


def test_unpacked_tensors_share_the_payload() -> None:
    payload = pack(tensors())
    unpacked = unpack(payload)
    payload[-4:] = 0
    begin = payload.ctypes.data
    assert all(begin <= t.data_ptr() < begin + payload.nbytes for t in unpacked.values() if t.numel())


def test_the_checksum_is_that_of_the_bytes_however_they_come() -> None:
    payload = np.arange(100_000, dtype=np.uint8)
    pieces = Checksum()
    for start in range(0, payload.nbytes, 7_777):
        pieces.update(payload[start : start + 7_777].data)
    assert pieces.hex() == checksum(payload)
    assert len(checksum(payload)) == 32
    payload[500] ^= 1
    assert pieces.hex() != checksum(payload)


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[]",
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
        b'{"a":{"dtype":"Q7","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":3}',
    ],
)
def test_what_is_no_safetensors_file_is_corrupt(header: bytes) -> None:
    payload = np.frombuffer(len(header).to_bytes(8, "little") + header + b"\0" * 8, dtype=np.uint8)
    with pytest.raises(WeightsCorrupt):
        unpack(payload)


def test_names_are_read_without_the_tensors() -> None:
    assert names_in(pack(tensors())) == list(unpack(pack(tensors())))
    for broken in (b"{", b"[]"):
        with pytest.raises(WeightsCorrupt):
            names_in(np.frombuffer(len(broken).to_bytes(8, "little") + broken, dtype=np.uint8))
