"""Weight channels: they transport policy versions from the learner to the actors."""

from __future__ import annotations

from pathlib import Path

from services.config.tree import BufferConfig, WeightsConfig
from services.weights.channel import Delivery, StoringChannel, WeightChannel, WeightVersion
from services.weights.errors import TransferLost, WeightsCorrupt, WeightsError, WeightsGone, WeightsUnavailable

__all__ = [
    "Delivery",
    "StoringChannel",
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
    """Open the channel that `config` selects.

    Args:
        config: the `weights` section of the configuration.
        run: name of the run.
        folder: folder of the run, used if no `directory` is configured; that gets one folder per run.
        redis_url: address of the run's Redis, for `nccl`.
        reader: name of this reader, for `nccl`; None for the publisher.
        width: number of workers of the reader's engine, for `nccl`.

    Raises:
        WeightsError: `nccl` without `redis_url`.
    """
    if config.channel == "ray":
        from services.weights.ray_store import RayChannel

        return RayChannel(run, config.timeout_s)
    if config.channel == "nccl":
        from services.weights.collective import CollectiveChannel
        from services.weights.coordination import Coordination
        from services.weights.nccl import NcclSender

        if redis_url is None:
            raise WeightsError("weights.channel=nccl needs the run's Redis: set buffer.redis_url")
        coordination = Coordination(redis_url, run, BufferConfig())
        if reader is None:
            coordination.clear()
        return CollectiveChannel(
            coordination, NcclSender, reader=reader or "publisher", width=width, timeout_s=config.timeout_s
        )
    from services.weights.directory import DirectoryChannel

    return DirectoryChannel(config.directory / run if config.directory else folder / "weights", config.timeout_s)
