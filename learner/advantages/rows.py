"""Input and output of an advantage estimator: one row a step, as parallel arrays, and the sums that estimators share.

Invariants
- Rows may be in any order; `trajectory` and `step` define which row follows which.
- Everything is float64: step returns that are equal on paper stay equal, so their spread is 0 and not rounding noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.config.tree import AdvantageConfig

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

EPSILON = 1e-6


@dataclass(frozen=True, slots=True)
class StepRows:
    """The steps of complete groups, N rows.

    Attributes:
        group: int64 [N], which group.
        trajectory: int64 [N], which trajectory; a number belongs to one group only.
        step: int64 [N], number of the step within its trajectory.
        step_group: int64 [N], which step group (see `learner.anchors`).
        reward: float64 [N], reward of the step's transition.
        valid: bool [N], the response passed the run's validity rule.
    """

    group: Ids
    trajectory: Ids
    step: Ids
    step_group: Ids
    reward: Floats
    valid: Flags

    def __len__(self) -> int:
        return len(self.group)


@dataclass(frozen=True, slots=True)
class Advantages:
    """float64 [N] each: episode level, step level (0 where the estimator has none), and the advantage itself."""

    episode: Floats
    step: Floats
    total: Floats


Estimator = Callable[[StepRows, AdvantageConfig], Advantages]


def step_returns(rows: StepRows, gamma: float, penalty: float = 0.0) -> Floats:
    """Step returns R_t = r_t + γ·R_{t+1} (GiGPO, eq. 5), less the penalty on invalid steps; float64 [N].

    Example, γ = 0.5, penalty 0.1, one trajectory of four steps, the third of them invalid:
        reward     0      0     0      1
        return     0.125  0.25  0.5    1
        result     0.125  0.25  0.4    1     the penalty stays with its step
    """
    order, left = _in_order(rows)
    discounted = rows.reward[order]
    # Backwards through all trajectories at once: first the rows with one step left, then those with two, …
    by_left = np.argsort(left, kind="stable")
    counts = np.bincount(left)
    for now in np.split(by_left, np.cumsum(counts)[:-1])[1:]:
        discounted[now] += gamma * discounted[now + 1]
    returns = np.empty(len(rows))
    returns[order] = discounted
    # After discounting: the penalty of a step must not reach the returns of the steps before it.
    return returns - penalty * ~rows.valid


def episode_scores(rows: StepRows, penalty: float = 0.0) -> Floats:
    """Undiscounted sum of the trajectory's rewards, less the penalty on the rows that are invalid steps; [N]."""
    trajectory = dense(rows.trajectory)
    sums = np.bincount(trajectory, weights=rows.reward)
    return sums[trajectory] - penalty * ~rows.valid


def first_rows(rows: StepRows) -> Flags:
    """bool [N]: the row is its trajectory's first."""
    order, left = _in_order(rows)
    mask = np.zeros(len(rows), dtype=np.bool_)
    mask[order] = np.r_[True, left[:-1] == 0]
    return mask


def earlier_rows(rows: StepRows) -> Ids:
    """int64 [N]: number of the row of the trajectory's step before; −1 for its first."""
    order, left = _in_order(rows)
    before = np.r_[-1, order[:-1]]
    before[np.flatnonzero(np.r_[True, left[:-1] == 0])] = -1
    out = np.empty(len(rows), dtype=np.int64)
    out[order] = before
    return out


def _in_order(rows: StepRows) -> tuple[Ids, Ids]:
    """Row numbers in trajectory and step order, and how many steps of the trajectory come after each; int64 [N]."""
    trajectory, step = rows.trajectory, rows.step
    rising = (trajectory[1:] > trajectory[:-1]) | ((trajectory[1:] == trajectory[:-1]) & (step[1:] > step[:-1]))
    order = np.arange(len(rows)) if rising.all() else np.lexsort((step, trajectory))
    ordered = trajectory[order]
    ends = np.flatnonzero(np.r_[ordered[1:] != ordered[:-1], True])
    lengths = np.diff(ends, prepend=-1)
    return order, np.repeat(ends, lengths) - np.arange(len(rows))


def dense(ids: Ids) -> Ids:
    """Ids that can index an array of about N: themselves where they are small, else renumbered from 0."""
    if len(ids) and ids.min() >= 0 and ids.max() < 2 * len(ids):
        return ids
    return np.unique(ids, return_inverse=True)[1]
