"""What a run has on record: the groups of each update, in the ledger and with the prepared numbers in the archive, and
which panels were played."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from learner.advantages.penalty import before_normalisation
from learner.advantages.rows import step_returns
from learner.ledger import Entry, Ledger
from learner.rows import PreparedUpdate
from services.archive import GroupArchive, GroupRecord, StepNumbers
from services.config.tree import Config
from services.run_folder import LEDGER_NAME
from services.schemas import Trajectory
from services.telemetry import METRICS_NAME

SUCCESS = "evaluation/success_rate"

Groups = Mapping[int, Sequence[Trajectory]]


class History:
    """The ledger and the archive of a run's folder."""

    def __init__(self, folder: Path, config: Config) -> None:
        self._ledger = Ledger(folder / LEDGER_NAME)
        self._archive = GroupArchive(folder, config.telemetry.keep_groups_mib * 2**20)
        self._config = config

    def append(self, update: int, groups: Groups, prepared: PreparedUpdate) -> None:
        """Add the groups of an update. Raises CheckpointFailed when the ledger cannot be written."""
        self._ledger.append([_entry(update, number, group) for number, group in groups.items()])
        self._archive.append(update, group_records(groups, prepared, self._config))

    def cut(self, update: int) -> None:
        """Forget what came after `update`."""
        self._ledger.cut(update)
        self._archive.cut(update)


def group_records(groups: Groups, prepared: PreparedUpdate, config: Config) -> list[GroupRecord]:
    """One record a group. `prepared` was made of the same groups in the same order, so its rows follow theirs."""
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
    """Policy versions whose panels stand in the metrics of a run's folder; a broken line holds none."""
    try:
        lines = (folder / METRICS_NAME).read_bytes().splitlines()
    except OSError:
        return set()
    versions = set()
    for line in lines:
        try:
            record = json.loads(line)
            if SUCCESS in record:
                versions.add(int(record["step"]))
        except (ValueError, KeyError, TypeError):
            continue
    return versions
