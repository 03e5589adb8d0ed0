from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

from services.config.tree import WeightsConfig
from services.weights import (
    WeightsCorrupt,
    WeightsGone,
    WeightsUnavailable,
    WeightVersion,
    open_channel,
)
from services.weights.directory import DirectoryChannel


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "embed": torch.randn(7, 5, generator=generator),
        "half": torch.randn(3, generator=generator).to(torch.bfloat16),
        "ids": torch.arange(6).reshape(2, 3),
        "scalar": torch.tensor(1.5, dtype=torch.float64),
        "empty": torch.empty(0, 4),
        "flag": torch.tensor([True, False, True]),
    }


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert one[name].shape == other[name].shape
        assert torch.equal(one[name], other[name]), name


@pytest.fixture
def channel(tmp_path: Path) -> DirectoryChannel:
    return DirectoryChannel(tmp_path / "weights", timeout_s=60.0)


def test_a_version_arrives_as_it_was_published(channel: DirectoryChannel, tmp_path: Path) -> None:
    assert channel.latest() is None
    published = channel.publish(3, tensors())
    reader = DirectoryChannel(tmp_path / "weights", timeout_s=60.0)
    assert reader.latest() == published
    assert published.version == 3
    assert_same(reader.fetch(published), tensors())


def test_shared_and_strided_tensors_are_published_by_value(channel: DirectoryChannel) -> None:
    flat = torch.arange(12.0)
    parameter = torch.nn.Parameter(flat[2:6])
    wanted = {"tied": flat, "head": flat, "slice": parameter, "transposed": flat.reshape(3, 4).T}
    fetched = channel.fetch(channel.publish(0, wanted))
    assert_same(fetched, {name: tensor.detach() for name, tensor in wanted.items()})


def test_the_last_two_publications_are_kept(channel: DirectoryChannel, tmp_path: Path) -> None:
    first, second, third = (channel.publish(version, tensors(version)) for version in (1, 2, 3))
    assert channel.latest() == third
    assert_same(channel.fetch(second), tensors(2))
    with pytest.raises(WeightsGone, match="version 1"):
        channel.fetch(first)
    assert {path.name for path in (tmp_path / "weights").iterdir()} == {second.locator, third.locator, "latest.json"}


def test_an_older_number_published_last_is_the_latest(channel: DirectoryChannel) -> None:
    before = channel.publish(5, tensors(5))
    again = channel.publish(4, tensors(4))
    assert channel.latest() == again
    assert_same(channel.fetch(before), tensors(5))


def test_the_same_number_with_other_weights_disturbs_no_reader(channel: DirectoryChannel) -> None:
    before = channel.publish(5, tensors(0))
    after = channel.publish(5, tensors(1))
    assert before.locator != after.locator
    assert_same(channel.fetch(before), tensors(0))
    assert channel.publish(5, tensors(1)) == after
    assert_same(channel.fetch(before), tensors(0))


@pytest.mark.parametrize("damage", ["flip", "cut", "grow"])
def test_damage_is_noticed(channel: DirectoryChannel, tmp_path: Path, damage: str) -> None:
    published = channel.publish(1, tensors())
    path = tmp_path / "weights" / published.locator
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
    path.write_bytes({"flip": content, "cut": content[:-1], "grow": content + b"x"}[damage])
    with pytest.raises(WeightsCorrupt, match="damaged"):
        channel.fetch(published)


def test_another_checksum_is_refused(channel: DirectoryChannel) -> None:
    published = channel.publish(1, tensors())
    with pytest.raises(WeightsCorrupt):
        channel.fetch(dataclasses.replace(published, checksum="0" * 32))


def test_nothing_is_announced_when_the_payload_cannot_be_written(
    channel: DirectoryChannel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = channel.publish(1, tensors(1))

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WeightsUnavailable, match="No space left on device"):
        channel.publish(2, tensors(2))
    assert channel.latest() == before
    assert {path.name for path in (tmp_path / "weights").iterdir()} == {before.locator, "latest.json"}


def test_leftovers_of_a_killed_publisher_go(channel: DirectoryChannel, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / ".00000001-x.safetensors.1.partial").write_bytes(b"half")
    (folder / "00000001-x.safetensors").write_bytes(b"whole, never announced")
    assert channel.latest() is None
    published = channel.publish(1, tensors())
    assert {path.name for path in folder.iterdir()} == {published.locator, "latest.json"}


@pytest.mark.parametrize("content", ["", "{}", "[1]", json.dumps([{"version": 1}])])
def test_a_damaged_announcement_is_one_clear_line(channel: DirectoryChannel, tmp_path: Path, content: str) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "latest.json").write_text(content)
    with pytest.raises(WeightsCorrupt, match=r"latest\.json is damaged"):
        channel.latest()


def test_an_unusable_folder_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    channel = DirectoryChannel(tmp_path / "file" / "weights", timeout_s=60.0)
    with pytest.raises(WeightsUnavailable, match="cannot write weights of version 1"):
        channel.publish(1, tensors())
    with pytest.raises(WeightsUnavailable, match="cannot read"):
        channel.latest()
    with pytest.raises(WeightsUnavailable, match="cannot read weights of version 1"):
        channel.fetch(WeightVersion(1, 1, "x", "x"))


def test_the_time_limit_holds(channel: DirectoryChannel, tmp_path: Path) -> None:
    published = channel.publish(1, tensors(1))
    late = DirectoryChannel(tmp_path / "weights", timeout_s=0.0)
    with pytest.raises(WeightsUnavailable, match="timeout_s"):
        late.publish(2, tensors(2))
    with pytest.raises(WeightsUnavailable, match="timeout_s"):
        late.fetch(published)
    assert late.latest() == published


def test_open_channel_keeps_runs_apart(tmp_path: Path) -> None:
    shared = WeightsConfig(channel="directory", directory=tmp_path / "shared")
    one, other = (open_channel(shared, run, tmp_path / run) for run in ("one", "other"))
    one.publish(1, tensors())
    assert other.latest() is None
    own = open_channel(WeightsConfig(channel="directory"), "one", tmp_path / "one")
    own.publish(2, tensors())
    assert (tmp_path / "one" / "weights" / "latest.json").exists()
