"""Find groups that make an update impossible: by their advantages, or by the policy's own log-probabilities.

Invariants
- Only the groups found are cancelled; the others of the update are kept and trained on.
- A run in which `MOST_TRIES` updates in a row are impossible ends, with the last reason.

Example: an update of groups 4, 5 and 6, in which an environment gave group 5 a reward of 1e200.

    unusable    advantages reach 3, 1e200, 2    {5: "its advantages reach 1e+200; ..."}
                5 is cancelled, the next group takes its place, and the update is tried again

    If all advantages are fine and the loss is still not finite, each group goes through the policy alone:
    culprits    finite, not finite, finite      {5: "...: the policy's log-probabilities of it are not finite"}
                finite, finite, finite          RunStalled: the fault is in the weights, not in a group
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from learner.prepare import PreparedUpdate
from services.errors import RunStalled
from services.schemas import Trajectory

LARGEST_ADVANTAGE = 1e12
"""The norm of a gradient is a sum of squares in float32, whose largest number is 3e38."""
MOST_TRIES = 3

Groups = Mapping[int, Sequence[Trajectory]]


def unusable(groups: Groups, prepared: PreparedUpdate) -> dict[int, str]:
    """Find groups with an advantage that is too large or not a number.

    Args:
        groups: of the update, by number.
        prepared: from these groups.

    Returns:
        The reason for each group found.
    """
    sizes = np.abs(prepared.advantages.total)
    group = prepared.table.group[prepared.turn]
    wrong = ~(sizes <= LARGEST_ADVANTAGE)  # not `>`, which is false for NaN
    found = {}
    for place, number in enumerate(groups):
        own = (group == place) & wrong
        if own.any():
            reward = max((step.reward for t in groups[number] for step in t.steps), key=abs)
            found[number] = f"its advantages reach {sizes[own].max():.3g}; the largest reward is {reward:.3g}"
    return found


def culprits(groups: Groups, finite: Callable[[Groups], bool], cause: str) -> dict[int, str]:
    """Find groups for which the policy's log-probabilities are not finite.

    Args:
        groups: of the update, by number.
        finite: whether the policy's log-probabilities of some groups are all finite.
        cause: why the update failed.

    Returns:
        The reason for each group found.

    Raises:
        RunStalled: none of the groups, or every one: the groups are not at fault.
    """
    reason = f"{cause}: the policy's log-probabilities of it are not finite"
    found = {number: reason for number, group in groups.items() if not finite({number: group})}
    if not found or len(found) == len(groups):
        raise RunStalled(
            f"no update is possible: {cause}, and the policy's log-probabilities are "
            + ("finite for each of its groups" if not found else "finite for none of its groups")
            + "; resume from an older checkpoint with a lower optimizer.lr, or with model.dtype=float32"
        )
    return found


class Tries:
    """Counts the tries of an update that failed, in a row."""

    def __init__(self) -> None:
        self._failed = 0

    def made(self) -> None:
        """Start again from 0: an update succeeded."""
        self._failed = 0

    def failed(self, update: int, reasons: Mapping[int, str]) -> None:
        """Count a failed try.

        Args:
            update: number of the update.
            reasons: by group.

        Raises:
            RunStalled: it was the last of `MOST_TRIES`.
        """
        self._failed += 1
        if self._failed >= MOST_TRIES:
            group, reason = next(iter(reasons.items()))
            raise RunStalled(
                f"update {update} failed in {MOST_TRIES} tries, each with different groups; the last, "
                f"group {group}: {reason}"
            )
