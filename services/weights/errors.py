"""Errors of weight channels."""

from __future__ import annotations

from services.errors import AnchorageError


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
