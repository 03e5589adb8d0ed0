"""What a rank sends through a collective channel: its snapshots, version after version."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from learner.rank.outbox import Outbox
from services.config.tree import WeightsConfig
from services.weights import WeightChannel, open_channel
from services.weights.collective import CollectiveChannel
from services.weights.digest import Digest
from services.weights.memory import MemoryFile
from services.weights.payload import Layout, fill
from tests.services.weights.receiver import Receiver
from tests.waiting import until

CONFIG = WeightsConfig.model_validate({"channel": "gloo", "timeout_s": 120.0})


@pytest.fixture
def ends(redis_url: str, run_name: str) -> Iterator[tuple[WeightChannel, CollectiveChannel]]:
    """The publisher's end and a reader's."""
    publisher = open_channel(CONFIG, run_name, Path(), redis_url=redis_url)
    reader = open_channel(CONFIG, run_name, Path(), redis_url=redis_url, reader="reader")
    assert isinstance(reader, CollectiveChannel)
    yield publisher, reader
    publisher.close()
    reader.close()


def snapshot(outbox: Outbox, value: float, seen: Digest) -> MemoryFile:
    """As the engine takes it, with the digest of what is copied."""
    tensors = {"a": torch.full((1000,), value), "b": torch.full((3,), value, dtype=torch.bfloat16)}
    layout = Layout.of(tensors)
    file = outbox.room(layout.nbytes)
    fill(layout.write_header(file.payload), tensors.items())
    seen.include(tensors.items())
    return file


def test_versions_are_sent_from_two_files_and_the_announced_one_is_not_written_over(
    ends: tuple[WeightChannel, CollectiveChannel],
) -> None:
    publisher, reader = ends
    outbox, receiver, files = Outbox(publisher), Receiver(), []
    for version in range(1, 5):
        seen = Digest()
        if version > 2:  # the thread that serves rounds may be looking at it still, for a moment
            until(files[version - 3].lock)
        files.append(snapshot(outbox, version, seen))
        if version > 1:  # the next snapshot is written already: who asks now still gets the one before
            before = reader.latest()
            assert before is not None
            assert before.version == version - 1
            received = receiver.load(reader.receive(before))
            assert received["a"].tolist() == [version - 1.0] * 1000
        outbox.send(version, files[-1], seen.hex())
        assert outbox.announced(120.0)
        newest = reader.latest()
        assert newest is not None
        assert (newest.version, newest.checksum) == (version, seen.hex())
    assert files[0] is files[2]
    assert files[1] is files[3]
    assert files[0] is not files[1]
    outbox.close()
