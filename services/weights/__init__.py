"""Weight channels: how a policy version gets from the learner to the actors."""

from __future__ import annotations

from pathlib import Path

from services.config.tree import BufferConfig, WeightsConfig
from services.weights.channel import (
    TransferLost,
    WeightChannel,
    WeightsCorrupt,
    WeightsError,
    WeightsGone,
    WeightsUnavailable,
    WeightVersion,
)

__all__ = [
    "TransferLost",
    "WeightChannel",
    "WeightVersion",
    "WeightsCorrupt",
    "WeightsError",
    "WeightsGone",
    "WeightsUnavailable",
    "open_channel",
]


def open_channel(
    config: WeightsConfig,
    run: str,
    folder: Path,
    *,
    redis_url: str | None = None,
    reader: str | None = None,
    width: int = 1,
) -> WeightChannel:
    """The channel that `config` names. `folder` is the run's own; a configured `directory` gets one folder a run.

    `nccl` also needs the run's Redis, and of a reader its name and the number of its engine's workers; without a name
    it is the publisher's.

    Raises:
        WeightsError: `nccl` without a Redis.
    """
    if config.channel == "ray":
        from services.weights.ray_store import RayChannel

        return RayChannel(run, config.timeout_s)
    if config.channel == "nccl":
        from services.weights.collective import CollectiveChannel
        from services.weights.coordination import Board
        from services.weights.nccl import NcclSender

        if redis_url is None:
            raise WeightsError("weights.channel=nccl needs the address of the run's Redis")
        board = Board(redis_url, run, BufferConfig())
        if reader is None:
            board.clear()
        return CollectiveChannel(
            board, NcclSender, reader=reader or "publisher", width=width, timeout_s=config.timeout_s
        )
    from services.weights.directory import DirectoryChannel

    return DirectoryChannel(config.directory / run if config.directory else folder / "weights", config.timeout_s)
