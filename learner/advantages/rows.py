"""What an advantage estimator reads and answers: one row a step, as parallel arrays, and the sums they share.

Invariants
- Rows may stand in any order; `trajectory` and `step` say what follows what.
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
    """R_t = r_t + γ·R_{t+1} (GiGPO, eq. 5), less the penalty on invalid steps; [N]."""
    _, trajectory = np.unique(rows.trajectory, return_inverse=True)
    order = np.lexsort((rows.step, trajectory))
    lengths = np.bincount(trajectory, minlength=1)
    starts = np.cumsum(lengths) - lengths
    place = np.arange(len(rows)) - np.repeat(starts, lengths)
    rewards = np.zeros((len(lengths), int(lengths.max()) + 1))
    rewards[trajectory[order], place] = rows.reward[order]
    for t in range(rewards.shape[1] - 2, -1, -1):
        rewards[:, t] += gamma * rewards[:, t + 1]
    returns = np.empty(len(rows))
    returns[order] = rewards[trajectory[order], place]
    # After discounting: the penalty of a step must not reach the returns of the steps before it.
    return returns - penalty * ~rows.valid


def episode_scores(rows: StepRows, penalty: float = 0.0) -> Floats:
    """Undiscounted sum of the trajectory's rewards, less the penalty on the rows that are invalid steps; [N]."""
    _, trajectory = np.unique(rows.trajectory, return_inverse=True)
    sums = np.bincount(trajectory, weights=rows.reward).astype(np.float64)
    return sums[trajectory] - penalty * ~rows.valid


def first_rows(rows: StepRows) -> Flags:
    """bool [N]: the row is its trajectory's first."""
    order = np.lexsort((rows.step, rows.trajectory))
    ordered = rows.trajectory[order]
    mask = np.zeros(len(rows), dtype=np.bool_)
    mask[order] = np.r_[True, ordered[1:] != ordered[:-1]]
    return mask


def counting_rows(rows: StepRows, config: AdvantageConfig) -> Flags:
    """bool [N]: the rows whose scores make the episode statistics.

    Over `trajectories` each is represented by its first step, whose score carries that step's penalty, as in the
    published code.
    """
    return first_rows(rows) if config.episode_statistics == "trajectories" else np.ones(len(rows), dtype=np.bool_)


def moments(values: Floats, groups: Ids, counted: Flags | None = None) -> tuple[Floats, Floats, Floats]:
    """Mean, standard deviation (ddof 1) and count of each row's group, over the counted rows; [N] each."""
    _, group = np.unique(groups, return_inverse=True)
    weight = np.ones(len(values)) if counted is None else counted.astype(np.float64)
    count = np.bincount(group, weights=weight).astype(np.float64)
    mean = np.bincount(group, weights=weight * values) / count
    squares = np.bincount(group, weights=weight * (values - mean[group]) ** 2)
    deviation = np.sqrt(squares / np.maximum(count - 1, 1))
    return mean[group], deviation[group], count[group]


def episode_advantages(rows: StepRows, config: AdvantageConfig) -> Floats:
    """A_E = (score − mean) / F over the group (GiGPO, eq. 3); the score itself in a group of one."""
    scores = episode_scores(rows, config.invalid_action_penalty)
    mean, deviation, count = moments(scores, rows.group, counting_rows(rows, config))
    scale = deviation + EPSILON if config.normalisation == "std" else np.ones(len(rows))
    # The published code gives a lone score mean 0 and deviation 1.
    lone_scale = 1.0 + EPSILON if config.normalisation == "std" else 1.0
    return np.where(count > 1, (scores - mean) / scale, scores / lone_scale)
