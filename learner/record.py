"""What an update trained on, for the archive of groups: the prepared numbers, dealt back to their trajectories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from learner.advantages.rows import step_returns
from learner.rows import PreparedUpdate
from services.archive import GroupRecord, StepNumbers
from services.config.tree import Config
from services.schemas import Trajectory


def group_records(
    groups: Mapping[int, Sequence[Trajectory]], prepared: PreparedUpdate, config: Config
) -> list[GroupRecord]:
    """One record a group. `prepared` was made of the same groups in the same order, so its rows follow theirs."""
    table, advantages = prepared.table, prepared.advantages
    returns = step_returns(table, config.advantage.gamma, config.advantage.invalid_action_penalty)
    columns = (table.step_group, returns, advantages.episode, advantages.step, advantages.total)
    ends = np.cumsum([len(trajectory.steps) for group in groups.values() for trajectory in group])[:-1]
    numbers = [StepNumbers(*parts) for parts in zip(*(np.split(column, ends) for column in columns), strict=True)]
    dealt = iter(numbers)
    return [GroupRecord(number, group, [next(dealt) for _ in group]) for number, group in groups.items()]
