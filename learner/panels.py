"""Evaluation panels of a training run: when one is due, which were played, and the policy of the best one.

Invariants
- A panel is recorded only after its policy has been kept, if it is the best: a recorded panel is not played again, so a
  crash between the two, or of the ranks during the panel, costs a panel, never the best policy.
- After a return to an older checkpoint, panels and best policies of later versions count as not played.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Protocol

from learner import checkpoint
from learner.record import SUCCESS, evaluated_versions
from services.config.tree import Config
from services.run_folder import CHECKPOINTS_NAME

Evaluate = Callable[[int, Callable[[], bool]], Mapping[str, float]]
"""(policy version, should_stop) to the panel's figures by name; empty if the panel was cut short."""
Record = Callable[[int, Mapping[str, float]], None]
"""Writes the figures of a policy version to the run's metrics."""


class Exporter(Protocol):
    """What writes the evaluated policy; `learner.rank.group.RankGroup`."""

    def export(self, folder: Path) -> None: ...


def is_due(config: Config, version: int, played: Container[int]) -> bool:
    """Whether `version` is to be evaluated (`evaluation.every`) and is not in `played`."""
    every = config.evaluation.every
    return every is not None and version % every == 0 and version not in played


class Panels:
    """The panels of one run.

    Args:
        config: of the run.
        folder: the run's folder.
        ranks: have the policy that is evaluated.
        evaluate: plays a panel.
        record: writes the figures of a panel that was played to its end.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        ranks: Exporter,
        evaluate: Evaluate,
        record: Record,
    ) -> None:
        self._config = config
        self._folder = folder
        self._checkpoints = folder / CHECKPOINTS_NAME
        self._ranks = ranks
        self._evaluate = evaluate
        self._record = record
        self._played: set[int] = set()

    def resume(self) -> None:
        """Read from the run's metrics which panels were played."""
        self._played = evaluated_versions(self._folder)

    def cut(self, version: int) -> None:
        """Forget panels and best policies of versions after `version`: those updates will be repeated."""
        self._played = {played for played in self._played if played <= version}
        checkpoint.forget_best(self._checkpoints, after=version)

    def due(self, version: int) -> bool:
        """Whether `version` is to be evaluated (`evaluation.every`) and has not been yet."""
        return is_due(self._config, version, self._played)

    def play(self, version: int, should_stop: Callable[[], bool]) -> Mapping[str, float]:
        """Play the panel of `version`, due or not, keep its policy if it is the best, and record its figures.

        Returns:
            Figures by name; empty if the panel was cut short.

        Raises:
            CheckpointFailed: the best policy cannot be written.
            RankFailed: the ranks, which should write it, have died.
        """
        figures = self._evaluate(version, should_stop)
        if figures:
            # Keep before recording: a recorded panel is not played again after a crash.
            self._keep_if_best(version, figures)
            self._record(version, figures)
            self._played.add(version)
        return figures

    def _keep_if_best(self, version: int, figures: Mapping[str, float]) -> None:
        success = figures.get(SUCCESS)
        if success is None or not self._config.checkpoint.keep_best:
            return
        before = checkpoint.best(self._checkpoints)
        if before is not None and not success > before[1]:  # NaN is never better
            return
        checkpoint.keep_best(self._checkpoints, version, success, self._ranks.export)
