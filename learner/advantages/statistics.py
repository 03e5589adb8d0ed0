"""Means, deviations and normalised values over sets of rows.

Invariants
- A value normalised by a deviation is less than √n from 0, n the number of values that the deviation is of. A value
  that is one of them is at most (n − 1) / √n away; other values are clipped to that.
- Where the deviation is 0 nothing is divided by it. Sums that are equal on paper have no deviation, however float64
  rounds them.
- Values of any finite size: squares that would overflow are taken in units of the set's largest value.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from learner.advantages.rows import EPSILON, Flags, Floats, Ids, StepRows, dense
from services.config.tree import AdvantageConfig

HUGE = 1e100
"""Larger values are scaled before they are squared: float64 overflows at 1e308."""
NEGLIGIBLE = 1e-9
"""Smaller rounding errors are not computed exactly: an advantage of that size is not trained on anyway."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Statistics of the sets that rows belong to.

    Attributes:
        group: int64 [M], number of each value's set.
        mean / deviation / count: float64 [sets]; the deviation has ddof 1 and is 0 for a lone value.
        whole: every row counts.
        ddof: of the deviation: 1, or 0 for that of a population.
        rows: int64 [M], row that each value is of; None: the values are of all rows, M = N.
    """

    group: Ids
    mean: Floats
    deviation: Floats
    count: Floats
    whole: bool
    ddof: int = 1
    rows: Ids | None = None

    @property
    def row_count(self) -> Floats:
        """Number of values in each row's set; [N]."""
        return self.count[self.group]

    @property
    def population(self) -> Moments:
        """The same with the deviation of a population: the mean square's root."""
        shrunk = self.deviation * np.sqrt(np.maximum(self.count - 1, 0) / np.maximum(self.count, 1))
        return replace(self, deviation=shrunk, ddof=0)

    @property
    def row_mean(self) -> Floats:
        """Mean of each row's set; [N]."""
        return self.mean[self.group]


def moments(values: Floats, groups: Ids, counted: Flags | None = None, rows: Ids | None = None) -> Moments:
    """Statistics by `groups`, over the counted values; None: over all. `rows`: see `Moments`."""
    group = dense(groups)
    unit = _units(values, group)
    if unit is not None:
        found = moments(values / unit[group], group, counted, rows)
        return replace(found, mean=found.mean * unit, deviation=found.deviation * unit)
    weight = None if counted is None else counted.astype(np.float64)
    count = np.bincount(group, weights=weight).astype(np.float64)
    mean = np.bincount(group, weights=values if weight is None else weight * values) / np.maximum(count, 1)
    squares = (values - mean[group]) ** 2
    total = np.bincount(group, weights=squares if weight is None else weight * squares)
    return Moments(group, mean, np.sqrt(total / np.maximum(count - 1, 1)), count, weight is None, rows=rows)


def normalised(
    values: Floats, of: Moments, rows: StepRows, config: AdvantageConfig, noise: float | None = None
) -> Floats:
    """(value − mean) / F of every row; F is the deviation + 1e-6 with `std`, 1 with `mean`; [N].

    Args:
        values: float64 [N], scores or returns of the rows.
        of: statistics to compare them with: of these values, or of others.
        rows: whose rewards tell how large rounding errors can be.
        config: how to normalise.
        noise: largest rounding error of the values where they are not sums of rewards; None: they are.

    Example, `std`:
        0 0 0 4   mean 1, deviation 2   the 4 becomes (4 − 1) / 2 = 1.5 = (n − 1) / √n: no value of four gets more
        0 0 0 0   deviation 0           each becomes 0; a value −0.1 compared with these stays −0.1
    """
    least = _rounding(of, rows, config.invalid_action_penalty) if noise is None else noise
    centred = values - of.row_mean
    if isinstance(least, np.ndarray):
        centred = np.where(np.abs(centred) > least[of.group], centred, 0.0)
    if config.normalisation == "mean":
        return centred
    divisor = np.where(of.deviation > least, of.deviation + EPSILON, 1.0)
    scaled: Floats = centred / divisor[of.group]
    if of.whole and not isinstance(least, np.ndarray):
        return scaled
    most = (of.count - 1.0) / np.sqrt(np.maximum(of.count - 1 + of.ddof, 1))
    bound = np.where(of.count > 1, most, np.inf)[of.group]
    held: Floats = np.clip(scaled, -bound, bound)
    return held


def _units(values: Floats, group: Ids) -> Floats | None:
    """The largest size in each set, [sets], where any is huge; else None."""
    if not len(values) or max(values.max(), -values.min()) <= HUGE:
        return None
    largest = np.zeros(int(group.max()) + 1)
    np.maximum.at(largest, group, np.abs(values))
    return np.where(largest > HUGE, largest, 1.0)


def _rounding(of: Moments, rows: StepRows, penalty: float) -> Floats | float:
    """Largest difference that float64 rounding can make between two sums of the same rewards: [sets], or one number
    where it is negligible.

    A sum of n numbers is off by at most n · 2^-53 times the sum of their sizes; here n is that of an episode's rewards,
    then that of the set's values.
    """
    precision, longest = 4 * float(np.finfo(np.float64).eps), float(rows.step.max(initial=0)) + 1.0
    largest = max(float(rows.reward.max(initial=0.0)), -float(rows.reward.min(initial=0.0)))
    most = precision * longest * largest + precision * penalty
    if most * (float(of.count.max(initial=0.0)) + longest) <= NEGLIGIBLE:
        return NEGLIGIBLE
    trajectory = dense(rows.trajectory)
    size = np.bincount(trajectory, weights=precision * np.abs(rows.reward))[trajectory] + precision * penalty
    if of.rows is not None:
        size = size[of.rows]
    mean = np.bincount(of.group, weights=size) / np.maximum(np.bincount(of.group), 1)
    off: Floats = mean * (of.count + longest)
    return off
