"""Records of a run: the groups of each update in the ledger, with their advantages in the archive; warnings; panels."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

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
    table, advantages = prepared.table, prepared.advantages
    returns = step_returns(table, config.advantage.gamma, before_normalisation(config.advantage).invalid_action_penalty)
    columns = (table.step_group, returns, advantages.episode, advantages.step, advantages.total)
    ends = np.cumsum([len(trajectory.steps) for group in groups.values() for trajectory in group])[:-1]
    numbers = [StepNumbers(*parts) for parts in zip(*(np.split(column, ends) for column in columns), strict=True)]
    dealt = iter(numbers)
    return [GroupRecord(number, group, [next(dealt) for _ in group]) for number, group in groups.items()]


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
