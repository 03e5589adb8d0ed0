"""Weight channels: how a policy version gets from the learner to the actors."""

from __future__ import annotations

from pathlib import Path

from services.config.tree import WeightsConfig
from services.weights.channel import (
    WeightChannel,
    WeightsCorrupt,
    WeightsError,
    WeightsGone,
    WeightsUnavailable,
    WeightVersion,
)

__all__ = [
    "WeightChannel",
    "WeightVersion",
    "WeightsCorrupt",
    "WeightsError",
    "WeightsGone",
    "WeightsUnavailable",
    "open_channel",
]


def open_channel(config: WeightsConfig, run: str, folder: Path) -> WeightChannel:
    """The channel that `config` names. `folder` is the run's own; a configured `directory` gets one folder a run."""
    if config.channel == "ray":
        from services.weights.ray_store import RayChannel

        return RayChannel(run, config.timeout_s)
    from services.weights.directory import DirectoryChannel

    return DirectoryChannel(config.directory / run if config.directory else folder / "weights", config.timeout_s)
