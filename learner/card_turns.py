"""The learner's turns on the card that its ranks share with the rollout actors (`rollout.share_gpus: turns`).

Invariants
- Whatever needs the ranks' states on their device takes the card first (`services.buffer.card`) and loads them there.
- `rest` moves them to host memory and gives the card back. The trainer calls it wherever it waits for the actors.
- The turn is renewed by a thread, whatever the caller does. If it is over all the same (this process stood still for
  its lease), the next call takes the card again: what the ranks compute does not depend on it.
- Ranks that failed are restarted while the learner has the card.

Example: the calls of one update, and who has the card.

    trainer           ranks                        card
    rest              states to the host           given to the actors
    (waits for groups)
    update            states to the device         taken, once the engine sleeps
    publish           snapshot in host memory
    rest              states to the host           given
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from learner.batching import Row
from learner.prepare import OptimizerStep
from learner.rank.group import RankGroup, started
from services.buffer import Buffer
from services.buffer.card import Bid, Card, Hold, Turn
from services.config.tree import Config
from services.errors import AnchorageError, RedisUnavailable, RunStalled, RunTaken
from services.weights import WeightChannel

HOLDER = "learner"
POLL_S = 0.05
RENEWALS_A_LEASE = 10
PATIENCE_S = 3600.0
"""Longer than an engine takes to start or to wake, within its own limits."""

log = logging.getLogger(__name__)


class HeldCard:
    """The learner's hold on the card. Thread-safe.

    Args:
        card: of the run.
        lease_s: of a turn, in seconds.
    """

    def __init__(self, card: Card, lease_s: float) -> None:
        self._card = card
        self._lease_s = lease_s
        self._lock = threading.Lock()
        self._turn: Turn | None = None
        self._phase = ""
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self, phase: str) -> None:
        """Take the card unless it is held, and say what for.

        Raises:
            RunStalled: the actors keep it for `PATIENCE_S`.
        """
        bid, deadline = Bid(HOLDER, first=True), time.monotonic() + PATIENCE_S
        while not self.renew(phase):
            with self._lock:
                self._turn = self._card.take(bid, self._lease_s)
            if self._turn is None:
                if time.monotonic() > deadline:
                    raise RunStalled(f"the rollout actors kept the card for {PATIENCE_S:g} s (rollout.share_gpus)")
                time.sleep(POLL_S)
        if self._thread is None:
            self._thread = threading.Thread(target=self._keep, name="card", daemon=True)
            self._thread.start()

    def give(self) -> None:
        """Give the card back; no-op if it is not held."""
        with self._lock:
            turn, self._turn = self._turn, None
            if turn is not None:
                self._card.give(turn)

    def close(self) -> None:
        """Give the card back and end the thread."""
        self._ended.set()
        self.give()

    def renew(self, phase: str | None = None) -> bool:
        """Renew the turn, with a new phase or the same. Returns whether the card is held."""
        with self._lock:
            self._phase = self._phase if phase is None else phase
            if self._turn is not None and self._card.renew(self._turn, self._lease_s, self._phase) is Hold.OVER:
                log.warning("the learner lost the card: no renewal within %g s (rollout.lease_s)", self._lease_s)
                self._turn = None
            return self._turn is not None

    def _keep(self) -> None:
        while not self._ended.wait(self._lease_s / RENEWALS_A_LEASE):
            try:
                self.renew()
            except RedisUnavailable as error:
                log.warning("renewal of the card failed; retrying: %s", error)
            except RunTaken:
                return


class RanksInTurns(RankGroup):
    """Ranks that have their device only in the learner's turns; otherwise as `RankGroup`.

    Args:
        config: of the run.
        buffer: the run's, with its owner.
    """

    def __init__(self, config: Config, buffer: Buffer) -> None:
        super().__init__(config)
        self._card = HeldCard(buffer.card, config.rollout.lease_s)
        self._away = False

    def start(self) -> None:
        self._card.take("starting")
        self._away = False
        super().start()
        self.rest()

    def restart(self) -> None:
        self._card.take("starting")
        self._away = False
        self._kill()
        super().start()

    def rest(self) -> None:
        if not self._away:
            self._card.renew("parking")
            self._call("leave_device")
            self._away = True
        self._card.give()

    def stop(self) -> None:
        super().stop()
        try:
            self._card.close()
        except AnchorageError as error:
            log.warning("card not given back, its lease will expire: %s", error)

    def update(
        self, work: Sequence[Sequence[OptimizerStep]], meanwhile: Callable[[], None] | None = None
    ) -> dict[str, float]:
        self._ready("updating")
        return super().update(work, meanwhile)

    def finite(self, work: Sequence[Sequence[OptimizerStep]]) -> bool:
        self._ready("scoring")
        return super().finite(work)

    def gap(self, rows: Sequence[Row]) -> tuple[float, float]:
        self._ready("scoring")
        return super().gap(rows)

    def publish(self, version: int, channel: WeightChannel) -> None:
        self._ready("publishing")
        super().publish(version, channel)

    def save(self, folder: Path) -> None:
        self._ready("saving")
        super().save(folder)

    def export(self, folder: Path) -> None:
        self._ready("saving")
        super().export(folder)

    def load(self, folder: Path) -> None:
        self._ready("loading")
        super().load(folder)

    def _ready(self, phase: str) -> None:
        """Have the card, and the ranks' states on it."""
        if self._away:
            self._card.take("reloading")
            self._call("return_to_device")
            self._away = False
        self._card.take(phase)


def start_learner(config: Config, buffer: Buffer) -> RankGroup:
    """Start the learner's ranks as `rollout.share_gpus` says; see `RankGroup.start`."""
    return started(learner_ranks(config, buffer))


def learner_ranks(config: Config, buffer: Buffer) -> RankGroup:
    """The learner's ranks, not started."""
    return RanksInTurns(config, buffer) if config.rollout.share_gpus == "turns" else RankGroup(config)
