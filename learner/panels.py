"""Evaluation panels of a training run: when one is due, which were played, and the policy of the best one.

Invariants
- A panel is recorded only after its policy has been kept, if it is the best: a recorded panel is not played again, so a
  crash between the two costs a panel, never the best policy.
- After a return to an older checkpoint, panels and best policies of later versions count as not played.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from learner import checkpoint
from learner.record import SUCCESS, evaluated_versions
from services.config.tree import Config
from services.run_folder import CHECKPOINTS_NAME
from services.weights import WeightChannel, WeightsError

log = logging.getLogger(__name__)

Evaluate = Callable[[int, Callable[[], bool]], Mapping[str, float]]
"""(policy version, should_stop) to the panel's figures by name; empty if the panel was cut short."""
Record = Callable[[int, Mapping[str, float]], None]
"""Writes the figures of a policy version to the run's metrics."""


class WeightSource(Protocol):
    """Where the current weights come from if the channel has lost them; `learner.rank.group.RankGroup`."""

    def weights(self) -> dict[str, Tensor]: ...


def is_due(config: Config, version: int, played: Container[int]) -> bool:
    """Whether `version` is to be evaluated (`evaluation.every`) and is not in `played`."""
    every = config.evaluation.every
    return every is not None and version % every == 0 and version not in played


class Panels:
    """The panels of one run.

    Args:
        config: of the run.
        folder: the run's folder.
        channel: where the evaluated weights were published.
        ranks: fallback for weights that the channel has lost.
        evaluate: plays a panel.
        record: writes the figures of a panel that was played to its end.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        channel: WeightChannel,
        ranks: WeightSource,
        evaluate: Evaluate,
        record: Record,
    ) -> None:
        self._config = config
        self._folder = folder
        self._checkpoints = folder / CHECKPOINTS_NAME
        self._channel = channel
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
        """
        figures = self._evaluate(version, should_stop)
        if figures:
            self._played.add(version)
            # Keep before recording: a recorded panel is not played again after a crash.
            self._keep_if_best(version, figures)
            self._record(version, figures)
        return figures

    def _keep_if_best(self, version: int, figures: Mapping[str, float]) -> None:
        success = figures.get(SUCCESS)
        if success is None or not self._config.checkpoint.keep_best:
            return
        before = checkpoint.best(self._checkpoints)
        if before is not None and not success > before[1]:  # NaN is never better
            return
        weights = self._weights(version)
        checkpoint.keep_best(self._checkpoints, version, success, weights, self._config.model.path)

    def _weights(self, version: int) -> Mapping[str, Tensor]:
        """The evaluated weights: from the channel, because the ranks may have died during the panel, else from them."""
        try:
            published = self._channel.latest()
            if published is not None:
                return self._channel.fetch(published)
        except WeightsError as error:
            log.warning("cannot fetch version %d from the weight channel, asking the ranks: %s", version, error)
        return self._ranks.weights()
