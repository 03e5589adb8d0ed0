"""The training loop: tickets out, complete groups in, one policy update, the new version out.

Invariants
- A group leaves Redis only after a checkpoint that records it is durable; after a crash training goes on from the
  checkpoint over the same groups in the same order, so each is trained on once in the history that survives.
- Staleness is checked when a group is about to be used. Too old: counted, removed, issued again under its number.
- No wait without an end: a run in which nothing completes, or in which nothing usable does, stops with one clear line.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from learner import checkpoint
from learner.dispatch import Dispatcher
from learner.ledger import Entry, Ledger
from learner.prefetch import Prefetcher
from learner.rank_group import RankFailed
from learner.report import Timings, UpdateReport, describe, staleness
from learner.rows import OptimizerStep, prepare
from services.buffer import Buffer
from services.config.tree import Config
from services.errors import RunStalled
from services.schemas import TRAIN_STREAM, Trajectory
from services.telemetry import MetricsWriter
from services.weights import WeightChannel

POLL_S = 0.5
WASTE_LIMIT = 4
"""Give up when so many times the capacity was cancelled or dropped in one update: the run does not get anywhere."""

log = logging.getLogger(__name__)


class Ranks(Protocol):
    """What the trainer needs of the learner's ranks; see `learner.rank_group.RankGroup`."""

    checkpoint_bytes: int

    def update(self, work: Sequence[Sequence[OptimizerStep]]) -> dict[str, float]: ...
    def weights(self) -> dict[str, Tensor]: ...
    def save(self, folder: Path) -> None: ...
    def load(self, folder: Path) -> None: ...
    def restart(self) -> None: ...


class Trainer:
    """One run of the learner. `folder` is the run's; `splits` are the environment's split sizes.

    `on_update` is called after each published update; `evaluate` with the version, before the first update and after
    every `evaluation.every` of them, for numbers to record; `should_stop` is asked while waiting and between updates.
    """

    def __init__(
        self,
        config: Config,
        buffer: Buffer,
        channel: WeightChannel,
        ranks: Ranks,
        folder: Path,
        splits: Mapping[str, int],
        on_update: Callable[[UpdateReport], None] = lambda report: None,
        evaluate: Callable[[int], Mapping[str, float]] = lambda version: {},
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._config = config
        self._buffer = buffer
        self._channel = channel
        self._ranks = ranks
        self._folder = folder
        self._checkpoints = folder / "checkpoints"
        self._ledger = Ledger(folder / "ledger.jsonl")
        self._splits = splits
        self._on_update = on_update
        self._evaluate = evaluate
        self._should_stop = should_stop
        self._dispatcher = Dispatcher(config, splits)
        self._prefetch = Prefetcher(buffer, TRAIN_STREAM)
        self._version = 0
        self._saved_version = 0
        self._seconds = 0.0
        self._restarts = 0
        self._last_reason = ""
        self._metrics: MetricsWriter | None = None

    @property
    def version(self) -> int:
        """Policy version: the number of updates done."""
        return self._version

    def train(self, resume: bool = False) -> None:
        """Train to the end of the run, its time limit, or a stop; a checkpoint is left behind in each case.

        Raises:
            CheckpointFailed: a checkpoint cannot be written or read, or the folder holds one and `resume` is false.
            RunStalled: nothing (usable) completes, or the ranks keep dying.
        """
        if not resume:
            self._clear()
        with self._prefetch:
            self._train()

    def _train(self) -> None:
        try:
            self._start()
            if self._version == 0:
                self._play_panel()
            while True:
                try:
                    if self._over():
                        self._save_last()
                        return
                    report = self._update()
                except RankFailed as failure:
                    self._start(failure)
                    continue
                if report is not None:
                    self._tell(report)
        finally:
            self._close_metrics()

    def _start(self, failure: RankFailed | None = None) -> None:
        """Restore; after a failure of the ranks restart them first, as often as the run allows."""
        while True:
            try:
                if failure is not None:
                    self._restart_ranks(failure)
                self._restore()
                return
            except RankFailed as again:
                failure = again

    def _restart_ranks(self, failure: RankFailed) -> None:
        if self._restarts >= self._config.learner.max_restarts:
            raise RunStalled(f"{failure}; the ranks have been restarted {self._restarts} times (learner.max_restarts)")
        self._restarts += 1
        log.warning("%s; starting the ranks again from the last checkpoint", failure)
        self._ranks.restart()

    def _update(self) -> UpdateReport | None:
        """One update; None when stopped while waiting."""
        started = time.monotonic()
        collected = self._collect()
        if collected is None:
            return None
        groups, dropped, cancelled = collected
        waited = time.monotonic()
        prepared = prepare(list(groups.values()), self._config, self._version)
        ready = time.monotonic()
        loss = self._ranks.update(prepared.work)
        updated = time.monotonic()
        self._version += 1
        self._dispatcher.settle(list(groups))
        self._ledger.append([_entry(self._version, number, group) for number, group in groups.items()])
        weights = self._publish()
        published = time.monotonic()
        self._seconds += published - started
        # Groups stay in Redis until a checkpoint: without one a full buffer would starve the actors.
        if self._version % self._config.checkpoint.every == 0 or self._buffer.stats().full:
            self._save(weights)
        return describe(
            self._version,
            groups,
            prepared,
            dropped_stale=dropped,
            cancelled=cancelled,
            timings=Timings(waited - started, ready - waited, updated - ready, published - updated),
            loss=loss,
        )

    def _collect(self) -> tuple[dict[int, list[Trajectory]], int, int] | None:
        """The groups of the next update, and how many groups were dropped as stale and cancelled meanwhile."""
        ready: dict[int, list[Trajectory]] = {}
        dropped = cancelled = 0
        quiet_since = time.monotonic()
        while not self._should_stop():
            cancelled += self._give_up_cancelled()
            self._issue()
            window = self._dispatcher.window()
            dropped += self._read_complete([group for group in window if group not in ready], ready)
            if all(group in ready for group in window):
                return {group: ready[group] for group in window}, dropped, cancelled
            self._check_waste(dropped, cancelled)
            if self._buffer.wait(TRAIN_STREAM, POLL_S):
                quiet_since = time.monotonic()
            elif time.monotonic() - quiet_since > self._config.learner.group_timeout_s:
                raise RunStalled(
                    f"no group completed for {self._config.learner.group_timeout_s:g} s (learner.group_timeout_s); "
                    "are the rollout actors and the environment server up?"
                )
        return None

    def _issue(self) -> None:
        """Send new groups out, and again those that Redis does not know: new, dropped, or lost by it."""
        self._dispatcher.advance(self._config.learner.updates - self._version)
        missing = self._dispatcher.missing(self._buffer.known(TRAIN_STREAM))
        self._buffer.issue(self._dispatcher.tickets(missing))
        self._prefetch.want(self._dispatcher.outstanding)

    def _give_up_cancelled(self) -> int:
        """Free the slots of cancelled groups; the next groups take their place."""
        reasons = self._buffer.cancelled(TRAIN_STREAM)
        given_up = [group for group in reasons if group in self._dispatcher.outstanding]
        for group in given_up:
            self._last_reason = reasons[group]
            log.warning("group %d is given up: %s", group, self._last_reason)
        self._dispatcher.settle(given_up)
        return len(given_up)

    def _read_complete(self, wanted: Sequence[int], ready: dict[int, list[Trajectory]]) -> int:
        """Read those that are complete and fresh into `ready`, drop the stale ones; the number dropped."""
        complete = set(self._buffer.complete(TRAIN_STREAM))
        stale: list[int] = []
        for group in (group for group in wanted if group in complete):
            trajectories = self._prefetch.read(group)
            age = staleness(self._version, trajectories)
            if age > self._config.learner.max_staleness:
                log.warning("group %d is dropped and issued again: %d updates old", group, age)
                stale.append(group)
            else:
                ready[group] = trajectories
        self._buffer.remove(TRAIN_STREAM, stale)
        # Out, but no longer known to Redis: issue them right away, under the same numbers.
        self._buffer.issue(self._dispatcher.tickets(stale))
        return len(stale)

    def _check_waste(self, dropped: int, cancelled: int) -> None:
        limit = WASTE_LIMIT * self._dispatcher.capacity
        if cancelled > limit:
            raise RunStalled(
                f"{cancelled} groups were cancelled while one update waited, the last: {self._last_reason}"
            )
        if dropped > limit:
            raise RunStalled(f"{dropped} groups of one update were too old to use; do the actors load new weights?")

    def _publish(self) -> dict[str, Tensor]:
        weights = self._ranks.weights()
        self._channel.publish(self._version, weights)
        return weights

    def _save(self, weights: Mapping[str, Tensor]) -> None:
        """Write a checkpoint, then let go of the groups that it records."""
        state = checkpoint.TrainerState(
            version=self._version,
            dispatcher=self._dispatcher.state(),
            seconds=self._seconds,
            identity=checkpoint.identity(self._config),
        )
        checkpoint.save(
            self._checkpoints,
            state,
            weights=weights,
            model=self._config.model.path,
            engine=self._ranks.save,
            engine_bytes=self._ranks.checkpoint_bytes,
            keep=self._config.checkpoint.keep,
        )
        self._saved_version = self._version
        self._acknowledge()

    def _acknowledge(self) -> None:
        self._buffer.remove(TRAIN_STREAM, self._dispatcher.finished(self._buffer.known(TRAIN_STREAM)))

    def _clear(self) -> None:
        """A new run starts from nothing."""
        checkpoint.require_none(self._checkpoints)
        self._buffer.remove(TRAIN_STREAM, sorted(self._buffer.known(TRAIN_STREAM)))

    def _restore(self) -> None:
        """Go to the last checkpoint, or to the beginning; publish that version."""
        self._dispatcher = Dispatcher(self._config, self._splits)
        self._version, self._seconds = 0, 0.0
        found = checkpoint.latest(self._checkpoints)
        if found is not None:
            state = checkpoint.read_state(found, self._config)
            self._ranks.load(found / "engine")
            self._dispatcher.restore(state.dispatcher)
            self._version, self._seconds = state.version, state.seconds
            log.info("going on from %s", found)
        self._saved_version = self._version
        self._ledger.cut(self._version)
        # The process may have died between a checkpoint and its acknowledgement.
        self._acknowledge()
        self._publish()
        self._close_metrics()
        self._metrics = MetricsWriter(self._folder, self._config.telemetry.tensorboard, resume_step=self._version)

    def _tell(self, report: UpdateReport) -> None:
        self._record("update", report.update, report.scalars())
        self._on_update(report)
        self._play_panel()

    def _play_panel(self) -> None:
        every = self._config.evaluation.every
        if every is not None and self._version % every == 0 and not self._should_stop():
            self._record("evaluation", self._version, self._evaluate(self._version))

    def _record(self, kind: str, update: int, scalars: Mapping[str, float]) -> None:
        if self._metrics is not None:
            self._metrics.write(update, scalars)
        self._buffer.append_metrics({"kind": kind, "update": update, **scalars})

    def _close_metrics(self) -> None:
        if self._metrics is not None:
            self._metrics.close()

    def _save_last(self) -> None:
        if self._saved_version < self._version:
            self._save(self._ranks.weights())

    def _over(self) -> bool:
        minutes = self._config.run.minutes
        timed_out = minutes is not None and self._seconds >= 60 * minutes
        return self._version >= self._config.learner.updates or timed_out or self._should_stop()


def _entry(update: int, number: int, group: Sequence[Trajectory]) -> Entry:
    versions = [sorted({span.version for step in trajectory.steps for span in step.versions}) for trajectory in group]
    return Entry(update=update, group=number, versions=versions)
