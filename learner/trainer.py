"""The training loop: collect groups, update the policy, publish the new version.

Invariants
- A group leaves Redis only after a checkpoint that records it is durable. After a crash training resumes from the
  checkpoint over the same groups in the same order, so each is trained on once in the surviving history.
- The figures of an update are recorded before any checkpoint that covers it, and a resumed run plays a panel that is
  missing: a kill at any moment loses neither.
- Every wait ends: `intake` stops a run in which no usable group completes; ranks that keep crashing stop it here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from learner import checkpoint
from learner.batching import Sharing
from learner.commands import Commands, NotDone
from learner.dispatch import Dispatcher
from learner.intake import Intake
from learner.panels import Evaluate, Panels
from learner.prefetch import Prefetcher
from learner.prepare import OptimizerStep, PreparedUpdate, prepare
from learner.publication import Publication
from learner.rank.group import RankFailed
from learner.record import SUCCESS, History, WarningLog, record_algorithm
from learner.report import Timings, UpdateReport, describe
from learner.signal import Signal, figures
from learner.soundness import Groups, Tries, culprits, unusable
from services.buffer import Buffer
from services.buffer.commands import Action
from services.config.load import portable_tree
from services.config.tree import Config
from services.errors import RunStalled, UpdateNotFinite
from services.run_folder import CHECKPOINTS_NAME
from services.schemas import TRAIN_STREAM
from services.telemetry import MetricsWriter, open_metrics
from services.weights import WeightChannel

log = logging.getLogger(__name__)


class Ranks(Protocol):
    """The learner's ranks as the trainer uses them; see `learner.rank.group.RankGroup`."""

    checkpoint_bytes: int

    @property
    def sharing(self) -> Sharing: ...
    def update(self, work: Sequence[Sequence[OptimizerStep]], meanwhile: Callable[[], None]) -> dict[str, float]: ...
    def finite(self, work: Sequence[Sequence[OptimizerStep]]) -> bool: ...
    def publish(self, version: int, channel: WeightChannel) -> None: ...
    def published(self) -> bool: ...
    def rest(self) -> None: ...
    def save(self, folder: Path) -> None: ...
    def export(self, folder: Path) -> None: ...
    def load(self, folder: Path) -> None: ...
    def restart(self) -> None: ...


class Trainer:
    """One run of the learner.

    Args:
        config: of the run.
        buffer: the run's.
        channel: where policy versions are published.
        ranks: do the updates.
        folder: the run's folder.
        splits: sizes of the environments' splits.
        on_start: called with the policy version once it is published, before any group is issued.
        on_update: called after each published update.
        evaluate: plays the panel of a version, before the first update and after every `evaluation.every` of them. Gets
            the version and a function to ask while it waits whether to stop; returns figures, or none if cut short.
        should_stop: asked while waiting and between updates.
    """

    def __init__(
        self,
        config: Config,
        buffer: Buffer,
        channel: WeightChannel,
        ranks: Ranks,
        folder: Path,
        splits: Mapping[str, int],
        on_start: Callable[[int], None] = lambda version: None,
        on_update: Callable[[UpdateReport], None] = lambda report: None,
        evaluate: Evaluate = lambda version, should_stop: {},
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._config = config
        self._buffer = buffer
        self._ranks = ranks
        self._publication = Publication(channel, ranks)
        self._folder = folder
        self._checkpoints = folder / CHECKPOINTS_NAME
        self._history = History(folder, config)
        self._splits = splits
        self._on_start: Callable[[int], None] | None = on_start
        self._on_update = on_update
        self._panels = Panels(config, folder, ranks, evaluate, self._record_panel)
        self._should_stop = should_stop
        work = {Action.CHECKPOINT: self._checkpoint_now, Action.EVALUATE: self._evaluate_now}
        self._commands = Commands(buffer, work, should_stop)
        self._dispatcher = Dispatcher(config, splits)
        self._prefetch = Prefetcher(buffer, TRAIN_STREAM)
        self._version = 0
        self._saved_version = 0
        self._seconds = 0.0
        self._restarts = 0
        self._tries = Tries()
        self._signal = Signal()
        self._warned = WarningLog(folder)
        self._metrics: MetricsWriter | None = None

    @property
    def version(self) -> int:
        """Policy version: the number of updates done."""
        return self._version

    def train(self, resume: bool = False) -> None:
        """Train to the end of the run, its time limit, or a stop, and write a checkpoint in each case.

        Raises:
            CheckpointFailed: a checkpoint cannot be written or read, or the folder holds one and `resume` is false.
            RunStalled: no usable group completes, no update is possible, the sampler's log-probabilities are too far
                from the learner's, or the ranks keep crashing.
        """
        if resume:
            self._panels.resume()
            self._signal.given = self._warned.names()
        else:
            self._clear()
        record_algorithm(self._folder, self._config)
        with self._prefetch:
            self._train()

    def _train(self) -> None:
        try:
            self._commands.refuse_old()
            self._recover()
            while True:
                try:
                    self._call_on_start()
                    self._commands.carry_out()
                    self._play_panel_if_due()
                    if self._over():
                        self._publication.wait()
                        self._save_last()
                        self._ranks.rest()
                        return
                    self._update()
                except RankFailed as failure:
                    self._recover(failure)
        finally:
            self._close_metrics()

    def _call_on_start(self) -> None:
        """Call `on_start`, once, also if the ranks had to be restarted first."""
        if self._on_start is not None and not self._stopping():
            self._ranks.rest()
            self._on_start(self._version)
        self._on_start = None

    def _recover(self, failure: RankFailed | None = None) -> None:
        """Restore the newest checkpoint; after a failure restart the ranks first, up to `learner.max_restarts`."""
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
        log.warning("%s; restarting the ranks from the last checkpoint", failure)
        self._publication.forget()
        self._ranks.restart()

    def _update(self) -> None:
        """Do one update; none if stopped or interrupted by a command while waiting."""
        started = time.monotonic()
        announced = self._publication.announced
        rest = self._ranks.rest
        intake = Intake(self._config.learner, self._buffer, self._dispatcher, self._prefetch, announced, waiting=rest)
        collected = intake.collect(self._version, self._interrupted)
        if collected is None:
            return
        groups = collected.groups
        waited = time.monotonic()
        prepared = self._prepared(groups)
        ready = time.monotonic()
        loss = self._trained(groups, prepared, intake)
        if loss is None:
            return
        self._buffer.beat()  # raises RunTaken: the steps below would overwrite what another run owns now
        updated = time.monotonic()
        self._version += 1
        self._dispatcher.settle(list(groups))
        self._history.append(self._version, groups, prepared)
        self._publication.begin(self._version)
        published = time.monotonic()
        self._seconds += published - started
        report = describe(
            self._version,
            groups,
            prepared,
            dropped_stale=collected.stale,
            dropped_equal=collected.equal,
            dropped_unreadable=collected.unreadable,
            cancelled=collected.cancelled,
            timings=Timings(waited - started, ready - waited, updated - ready, published - updated),
            loss=loss,
        )
        self._record("update", report.update, report.scalars())
        self._warn(groups, prepared, loss)
        self._on_update(report)
        if self._version % self._config.checkpoint.every == 0:
            self._save()

    def _prepared(self, groups: Groups) -> PreparedUpdate:
        return prepare(list(groups.values()), self._config, self._version, self._ranks.sharing)

    def _trained(self, groups: Groups, prepared: PreparedUpdate, intake: Intake) -> dict[str, float] | None:
        """Update the policy. If that is impossible with these groups, cancel those at fault.

        If the version that is updated is still on its way to the actors, `intake` issues its tickets as soon as it has
        arrived, during the update.

        Returns:
            The loss metrics; None if groups were cancelled instead.

        Raises:
            RunStalled: several updates in a row were impossible, or no group is at fault.
        """
        wrong = unusable(groups, prepared)
        version = self._version

        def meanwhile() -> None:
            if not intake.issued and self._publication.seen():
                intake.issue(version)

        if not wrong:
            try:
                loss = self._ranks.update(prepared.work, meanwhile)
            except UpdateNotFinite as error:
                wrong = culprits(groups, self._finite, str(error))
            else:
                self._tries.made()
                return loss
        for group, reason in wrong.items():
            self._buffer.cancel(TRAIN_STREAM, group, reason)
        self._tries.failed(self._version + 1, wrong)
        return None

    def _finite(self, groups: Groups) -> bool:
        """Whether the policy's log-probabilities of the groups' responses are finite."""
        return self._ranks.finite(self._prepared(groups).work)

    def _warn(self, groups: Groups, prepared: PreparedUpdate, loss: Mapping[str, float]) -> None:
        """Log and record new warnings about the training signal. Raises RunStalled if the sampler is not the policy."""
        seen = figures(groups.values(), prepared.table, loss)
        for name, text in self._signal.judge(self._version, seen, self._config).items():
            log.warning("%s", text)
            self._warned.append(self._version, name, text)
            self._buffer.append_metrics({"kind": "warning", "update": self._version, "name": name, "text": text})

    def _interrupted(self) -> bool:
        self._publication.keep()
        self._make_room()
        return self._stopping() or self._commands.waiting()

    def _make_room(self) -> None:
        """Write a checkpoint if the buffer is full: only that removes trained groups, and makes room for new ones."""
        if self._saved_version < self._version and self._buffer.full():
            self._save_last()

    def _save(self) -> None:
        """Write a checkpoint, then remove the groups that it records from Redis."""
        state = checkpoint.TrainerState(
            version=self._version,
            dispatcher=self._dispatcher.state(),
            seconds=self._seconds,
            identity=checkpoint.identity(self._config),
        )
        checkpoint.save(
            self._checkpoints,
            state,
            engine=self._ranks.save,
            policy=self._ranks.export,
            nbytes=self._ranks.checkpoint_bytes,
            keep=self._config.checkpoint.keep,
            run=self._config.run.name,
            ranks=self._config.learner.ranks,
        )
        self._saved_version = self._version
        self._acknowledge()

    def _acknowledge(self) -> None:
        self._buffer.remove(TRAIN_STREAM, self._dispatcher.finished(self._buffer.known(TRAIN_STREAM)))

    def _clear(self) -> None:
        """Remove what an earlier run left under this name. Raises CheckpointFailed if it left checkpoints."""
        checkpoint.require_none(self._checkpoints)
        self._warned.clear()
        self._buffer.remove(TRAIN_STREAM, sorted(self._buffer.known(TRAIN_STREAM)))

    def _restore(self) -> None:
        """Return to the newest intact checkpoint, or to the initial policy, and publish that version.

        The dispatcher's state is the checkpoint's, so groups that were trained on since then are outstanding again.
        Those that Redis no longer has are issued and played again.
        """
        self._dispatcher = Dispatcher(self._config, self._splits)
        self._version, self._seconds = 0, 0.0
        found = checkpoint.newest_intact(self._checkpoints)
        if found is not None:
            state = checkpoint.read_state(found, self._config)
            checkpoint.set_aside_after(self._checkpoints, state.version)
            self._ranks.load(found / "engine")
            self._dispatcher.restore(state.dispatcher)
            self._version, self._seconds = state.version, state.seconds
            log.info("resuming from %s", found)
        self._saved_version = self._version
        self._panels.cut(self._version)
        self._history.cut(self._version)
        # The process may have crashed between writing a checkpoint and removing its groups.
        self._acknowledge()
        self._publication.publish(self._version)
        self._close_metrics()
        settings = portable_tree(self._config)
        self._metrics = open_metrics(self._folder, self._config.telemetry, resume_step=self._version, settings=settings)

    def _play_panel_if_due(self) -> None:
        if self._panels.due(self._version) and not self._stopping():
            self._publication.wait()
            self._panels.play(self._version, self._stopping_panel)

    def _stopping_panel(self) -> bool:
        self._publication.keep()
        self._ranks.rest()
        return self._stopping()

    def _record_panel(self, version: int, figures: Mapping[str, float]) -> None:
        self._record("evaluation", version, figures)

    def _record(self, kind: str, update: int, scalars: Mapping[str, float]) -> None:
        if self._metrics is not None:
            self._metrics.write(update, scalars)
        self._buffer.append_metrics({"kind": kind, "update": update, **scalars})

    def _close_metrics(self) -> None:
        if self._metrics is not None:
            self._metrics.close()

    def _save_last(self) -> None:
        if self._saved_version < self._version:
            self._save()

    def _checkpoint_now(self) -> str:
        self._save_last()
        return f"checkpoint {self._saved_version:06d} written"

    def _evaluate_now(self) -> str:
        self._publication.wait()
        success = self._panels.play(self._version, self._stopping_panel).get(SUCCESS)
        if success is None:
            raise NotDone("the panel was cut short")
        return f"success {success:.1%}"

    def _stopping(self) -> bool:
        return self._commands.stopped or self._should_stop()

    def _over(self) -> bool:
        ended = checkpoint.end_reached(self._config, self._version, self._seconds) is not None
        return ended or self._stopping()
