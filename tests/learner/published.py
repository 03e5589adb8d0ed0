"""The weights of real ranks, as they publish them."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from learner.rank.group import RankGroup
from services.weights.directory import DirectoryChannel
from tests.waiting import until


def published(group: RankGroup) -> dict[str, torch.Tensor]:
    """Publish what the ranks have now, through a folder of its own; the tensors by name."""
    with tempfile.TemporaryDirectory() as folder:
        channel = DirectoryChannel(Path(folder), 60.0)
        group.publish(0, channel)
        until(group.published)
        newest = channel.latest()
        assert newest is not None
        return channel.fetch(newest)
