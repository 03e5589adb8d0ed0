"""Weight channels: they transport policy versions from the learner to the actors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from services.config.tree import COLLECTIVE, BufferConfig, WeightsConfig
from services.weights.channel import Delivery, StoringChannel, WeightChannel, WeightVersion
from services.weights.errors import TransferLost, WeightsCorrupt, WeightsError, WeightsGone, WeightsUnavailable

if TYPE_CHECKING:
    from services.buffer.owner import Owner

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
    buffer: BufferConfig | None = None,
    owner: Owner | None = None,
    reader: str | None = None,
    width: int = 1,
) -> WeightChannel:
    """Open the channel that `config` selects.

    Args:
        config: the `weights` section of the configuration.
        run: name of the run.
        folder: folder of the run, used if no `directory` is configured; that gets one folder per run.
        redis_url: address of the run's Redis; for collective channels, and for publishers with an `owner`.
        buffer: limits and timeouts of the connection to Redis.
        owner: of the run's name, for the publisher: it announces nothing once it has lost the name.
        reader: name of this reader, for collective channels; None for the publisher.
        width: number of workers of the reader's engine, for collective channels.

    Raises:
        WeightsError: a collective channel without `redis_url`.
    """
    from services.weights.fence import Fence

    limits = buffer or BufferConfig()
    if config.channel in COLLECTIVE:
        from services.weights.collective import CollectiveChannel

        if redis_url is None:
            raise WeightsError(f"weights.channel={config.channel} needs the run's Redis: set buffer.redis_url")
        named = (owner, reader or "publisher", width)
        return CollectiveChannel(redis_url, run, limits, config.channel, config.timeout_s, *named)
    fence = Fence(redis_url, run, limits, owner) if owner is not None and redis_url is not None else None
    if config.channel == "ray":
        from services.weights.ray_store import RayChannel

        return RayChannel(run, config.timeout_s, fence)
    from services.weights.directory import DirectoryChannel

    versions = config.directory / run if config.directory else folder / "weights"
    return DirectoryChannel(versions, config.timeout_s, fence)
