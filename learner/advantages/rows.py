"""Input and output of an advantage estimator: one row a turn, as parallel arrays, and the sums that estimators share.

Here and in the estimators a step is a turn: the calls of the policy in one state (`services.turns`), nearly always one.

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
        state: int64 [N], state in which the action was chosen, as a node of the group's graph; None: its step group.
        next_state: int64 [N], state that the step led to, numbered likewise; −1: one that is not known. None: the state
            of the trajectory's next step, and not known after the last.
    """

    group: Ids
    trajectory: Ids
    step: Ids
    step_group: Ids
    reward: Floats
    valid: Flags
    state: Ids | None = None
    next_state: Ids | None = None

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
    returns = np.empty(len(rows))
    returns[order] = discounted_sums(rows.reward[order], left, gamma)
    # After discounting: the penalty of a step must not reach the returns of the steps before it.
    return returns - penalty * ~rows.valid


def discounted_sums(values: Floats, left: Ids, factor: float) -> Floats:
    """S_t = x_t + factor · S_{t+1} of every value of its sequence; float64 [N].

    Args:
        values: float64 [N], x: sequences one after the other.
        left: int64 [N], how many values of its sequence come after each.
        factor: of what comes later.
    """
    sums = values.copy()
    # Backwards through all sequences at once: first the values with one left, then those with two, …
    by_left = np.argsort(left, kind="stable")
    counts = np.bincount(left)
    for now in np.split(by_left, np.cumsum(counts)[:-1])[1:]:
        sums[now] += factor * sums[now + 1]
    return sums


def powers(base: float, exponents: Ids) -> Floats:
    """base^n of each exponent n >= 0; float64 [N]. One power for each different one is taken."""
    table: Floats = base ** np.arange(int(exponents.max(initial=0)) + 1, dtype=np.float64)
    return table[exponents]


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


def steps_left(rows: StepRows) -> Ids:
    """int64 [N]: how many steps of the trajectory come after each row's."""
    order, left = _in_order(rows)
    out = np.empty(len(rows), dtype=np.int64)
    out[order] = left
    return out


def later_rows(rows: StepRows) -> Ids:
    """int64 [N]: number of the row of the trajectory's next step; −1 for its last."""
    order, left = _in_order(rows)
    out = np.empty(len(rows), dtype=np.int64)
    out[order] = np.where(left > 0, np.r_[order[1:], -1], -1)
    return out


def transitions(rows: StepRows) -> tuple[Ids, Ids, Flags]:
    """Where each step began and where it led.

    Returns:
        int64 [N] twice: states numbered below 2 · (2 N), −1 for one that is not known; bool [N]: the trajectory's last
        step.

    Example: trajectories A B and B A, `next_state` None: sources A B B A, targets B −1 A −1.
    """
    after = later_rows(rows)
    source = rows.step_group if rows.state is None else rows.state
    target = np.where(after >= 0, source[after], -1) if rows.next_state is None else rows.next_state
    known = dense(np.concatenate([source, target[target >= 0]]))
    places = np.full(len(rows), -1, dtype=np.int64)
    places[target >= 0] = known[len(rows) :]
    return known[: len(rows)], places, after < 0


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
