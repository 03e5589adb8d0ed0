"""Records of a run: the groups of each update in the ledger, with their advantages in the archive; warnings; panels."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from learner.advantages import estimator_of
from learner.advantages.penalty import before_normalisation
from learner.advantages.rows import step_returns
from learner.ledger import Entry, Ledger
from learner.prepare import PreparedUpdate
from services.archive import GroupArchive, GroupRecord, StepNumbers
from services.config.tree import Config
from services.run_folder import ALGORITHM_NAME, LEDGER_NAME, WARNINGS_NAME
from services.schemas import Trajectory
from services.telemetry import METRICS_NAME

SUCCESS = "evaluation/success_rate"

log = logging.getLogger(__name__)

Groups = Mapping[int, Sequence[Trajectory]]


class History:
    """The ledger and the archive in a run's folder."""

    def __init__(self, folder: Path, config: Config) -> None:
        self._ledger = Ledger(folder / LEDGER_NAME)
        self._archive = GroupArchive(folder, config.telemetry.keep_groups_mib * 2**20)
        self._config = config

    def append(self, update: int, groups: Groups, prepared: PreparedUpdate) -> None:
        """Append the groups of an update. Raises CheckpointFailed if the ledger cannot be written."""
        self._ledger.append([_entry(update, number, group) for number, group in groups.items()])
        self._archive.append(update, group_records(groups, prepared, self._config))

    def cut(self, update: int) -> None:
        """Remove the updates after `update`."""
        self._ledger.cut(update)
        self._archive.cut(update)


def record_algorithm(folder: Path, config: Config) -> None:
    """Write what the run's estimator says of itself into its folder. A file that cannot be written costs only that.

    Raises:
        PluginError: the estimator cannot be loaded or described.
    """
    record = estimator_of(config).record(config.advantage)
    try:
        (folder / ALGORITHM_NAME).write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n")
    except OSError as error:
        log.warning("cannot write %s: %s", folder / ALGORITHM_NAME, error.strerror)


class WarningLog:
    """Warnings of a run, in its folder, so that none is repeated after a resumption."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / WARNINGS_NAME

    def clear(self) -> None:
        """Delete all warnings."""
        self._path.unlink(missing_ok=True)

    def append(self, update: int, name: str, text: str) -> None:
        """Append a warning. If the file cannot be written, the failure is logged and the run continues."""
        try:
            with self._path.open("a") as file:
                file.write(json.dumps({"update": update, "name": name, "text": text}) + "\n")
        except OSError as error:
            log.warning("cannot write %s: %s", self._path, error.strerror)

    def names(self) -> set[str]:
        """Names of the recorded warnings; damaged lines are skipped."""
        return {str(record["name"]) for record in _records(self._path) if "name" in record}


def group_records(groups: Groups, prepared: PreparedUpdate, config: Config) -> list[GroupRecord]:
    """Build one record for each group. `prepared` must come from the same groups in the same order."""
    table, turn, advantages = prepared.table, prepared.turn, prepared.advantages
    returns = step_returns(table, config.advantage.gamma, before_normalisation(config.advantage).invalid_action_penalty)
    episodes = [trajectory for group in groups.values() for trajectory in group]
    trained = np.array([step.trained for trajectory in episodes for step in trajectory.steps], dtype=np.bool_)
    ends = np.cumsum([len(trajectory.steps) for trajectory in episodes])[:-1]
    columns = (
        table.step_group[turn],
        returns[turn],
        advantages.episode,
        advantages.step,
        advantages.total,
        table.step[turn],
    )
    parts = (np.split(_of_steps(column, trained), ends) for column in columns)
    dealt = iter([StepNumbers(*own) for own in zip(*parts, strict=True)])
    return [GroupRecord(number, group, [next(dealt) for _ in group]) for number, group in groups.items()]


def _of_steps(column: NDArray[Any], trained: NDArray[np.bool_]) -> NDArray[Any]:
    """A column of trained calls as one of all steps; −1 or NaN for untrained ones."""
    out = np.full(len(trained), -1 if column.dtype == np.int64 else np.nan, dtype=column.dtype)
    out[trained] = column
    return out


def _entry(update: int, number: int, group: Sequence[Trajectory]) -> Entry:
    versions = [sorted({span.version for step in trajectory.steps for span in step.versions}) for trajectory in group]
    return Entry(update=update, group=number, versions=versions)


def evaluated_versions(folder: Path) -> set[int]:
    """Policy versions whose panels are in the metrics of a run's folder; damaged lines are skipped."""
    versions = set()
    for record in _records(folder / METRICS_NAME):
        try:
            if SUCCESS in record:
                versions.add(int(record["step"]))
        except (ValueError, KeyError, TypeError):
            continue
    return versions


def _records(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines. A missing file has none; damaged lines are skipped."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [record for record in found if isinstance(record, dict)]
