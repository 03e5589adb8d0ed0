"""Publishes policy versions, which travel while the learner goes on. Tickets that rely on one wait for it.

Invariants
- A version counts as announced only if every rollout actor that asks now gets it, or a newer one.
"""

from __future__ import annotations

import logging
from typing import Protocol

from services.weights import WeightChannel, WeightsError

log = logging.getLogger(__name__)


class Publisher(Protocol):
    """What has the weights; see `learner.rank.group.RankGroup`."""

    def publish(self, version: int, channel: WeightChannel) -> None: ...
    def published(self) -> bool: ...


class Publication:
    """The newest version and its way to the actors.

    Args:
        channel: announces versions.
        ranks: publish them.
    """

    def __init__(self, channel: WeightChannel, ranks: Publisher) -> None:
        self._channel = channel
        self._ranks = ranks
        self._version = -1
        self._under_way = False

    def begin(self, version: int) -> None:
        """Take a snapshot of the weights as `version` and let it travel. Raises WeightsUnavailable."""
        self._ranks.publish(version, self._channel)
        self._version, self._under_way = version, True

    def publish(self, version: int) -> None:
        """As `begin`; return when the version is announced."""
        self.begin(version)
        self.wait()

    def wait(self) -> None:
        """Return when the newest version is announced. Raises WeightsUnavailable if it cannot be stored."""
        while not self.announced():
            pass  # that waits a moment for it

    def announced(self) -> bool:
        """Whether the newest version is announced. Asks the ranks, which must be idle. Raises WeightsUnavailable."""
        self._under_way = self._under_way and not self._ranks.published()
        return not self._under_way

    def seen(self) -> bool:
        """As `announced`, but asks the channel: for while the ranks work. Raises nothing."""
        if self._under_way:
            try:
                newest = self._channel.latest()
            except WeightsError as error:
                log.info("weight channel unavailable: %s", error)
                return False
            # Numbers only repeat after a return to an older version, and that was announced before this one began.
            self._under_way = newest is None or newest.version != self._version
        return not self._under_way

    def forget(self) -> None:
        """Take back what the ranks, which have died, cannot send any more. Raises WeightsUnavailable, RunTaken."""
        self._channel.forget()
        self._under_way = False

    def keep(self) -> None:
        """Publish again if the channel has lost the version with a node: no actor could play without it."""
        if not self.announced():
            return
        try:
            published = self._channel.latest()
        except WeightsError as error:
            log.warning("weight channel unavailable: %s", error)
            return
        if published is None or published.version < self._version:
            log.warning("the weight channel has lost version %d, publishing it again", self._version)
            self.publish(self._version)
