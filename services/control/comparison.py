"""A kept group by every estimator, beside the advantages that it was trained with.

The estimators are the learner's, which this package does not import: whoever starts the control plane passes `Compare`.

Example, a group of two turns: trained with +1 and −1; another estimator says +2 and −2, a third 0 and 0.

    correlation   1 and none: a constant has none
    opposite      0 and 0: turns whose advantage has the other sign
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from services.archive import GroupEntry, numbers_of, read_index, read_trajectory
from services.config.tree import Config
from services.control.explorer import state_numbers
from services.control.group_views import ComparedEstimator, ComparedTurn, ComparisonView
from services.schemas import Trajectory

Floats = NDArray[np.float64]
Compare = Callable[[Config, Sequence[Sequence[Trajectory]], int], Mapping[str, Floats]]
"""Advantages of one group's turns by name of the estimator, float64 [turns]: from the run's configuration, all groups
of the update, and the group's place among them."""

FLAT = 1e-8
"""Smaller deviations are rounding: there is nothing to correlate."""


def comparison_view(path: Path, entry: GroupEntry, config: Config, compare: Compare) -> ComparisonView:
    """The group of `entry` by every estimator. Raises what `services.archive.read_trajectory` raises."""
    entries = read_index(path).groups
    place = next(number for number, other in enumerate(entries) if other.group == entry.group)
    groups = [[read_trajectory(path, member) for member in other.members] for other in entries]
    by_name = compare(config, groups, place)
    turns, recorded = _turns(entry, groups[place], by_name)
    names = list(by_name)
    return ComparisonView(
        group=entry.group,
        algorithm=config.algorithm,
        estimators=[
            ComparedEstimator(
                name=name,
                correlation=correlation(recorded, by_name[name]),
                opposite=int((np.sign(recorded) * np.sign(by_name[name]) < 0).sum()),
                deviation=float(by_name[name].std()),
            )
            for name in names
        ],
        deviation=float(recorded.std()),
        correlations=[[correlation(by_name[one], by_name[other]) for other in names] for one in names],
        turns=turns,
    )


def correlation(one: Floats, other: Floats) -> float | None:
    """Pearson's correlation; None if one of them does not vary."""
    if not len(one) or min(one.std(), other.std()) < FLAT:
        return None
    return float(np.clip(np.mean((one - one.mean()) * (other - other.mean())) / (one.std() * other.std()), -1.0, 1.0))


def _turns(
    entry: GroupEntry, episodes: Sequence[Trajectory], by_name: Mapping[str, Floats]
) -> tuple[list[ComparedTurn], Floats]:
    """The group's turns with all advantages, and those that it was trained with, float64 [turns]."""
    states = state_numbers(entry)
    turns: list[ComparedTurn] = []
    for member, episode in zip(entry.members, episodes, strict=True):
        numbers = numbers_of(member)
        last = {turn: call for call, turn in enumerate(numbers.turns.tolist())}
        for turn, first in enumerate(numbers.first_calls.tolist()):
            total = float(np.nan_to_num(numbers.total[first], posinf=0.0, neginf=0.0))
            turns.append(
                ComparedTurn(
                    member=member.member,
                    number=turn,
                    state=states[int(numbers.step_group[first])],
                    action=episode.steps[last[turn]].action,
                    recorded=total,
                    advantages=[float(values[len(turns)]) for values in by_name.values()],
                )
            )
    return turns, np.array([turn.recorded for turn in turns])
