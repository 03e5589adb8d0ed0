"""Groups that no update can be made of: found by their advantages, or by the policy's own log-probabilities.

Invariants
- Only the groups found are given up; the others of the update stay where they are and are trained on.
- A run that cannot make an update ends after `MOST_TRIES`, with the last reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from learner.prepare import PreparedUpdate
from services.errors import RunStalled
from services.schemas import Trajectory

LARGEST_ADVANTAGE = 1e12
"""The norm of a gradient is a sum of squares in float32, which ends at 1e38."""
MOST_TRIES = 3

Groups = Mapping[int, Sequence[Trajectory]]


def unusable(groups: Groups, prepared: PreparedUpdate) -> dict[int, str]:
    """Groups with an advantage that is too large or not a number, and why; `prepared` was made of these groups."""
    sizes = np.abs(prepared.advantages.total)
    wrong = ~(sizes <= LARGEST_ADVANTAGE)
    found = {}
    for place, number in enumerate(groups):
        own = (prepared.table.group == place) & wrong
        if own.any():
            reward = max((step.reward for t in groups[number] for step in t.steps), key=abs)
            found[number] = f"its advantages reach {sizes[own].max():.3g}; the largest reward is {reward:.3g}"
    return found


def culprits(groups: Groups, finite: Callable[[Groups], bool], cause: str) -> dict[int, str]:
    """Groups that the policy gives log-probabilities that are not finite, and why.

    Raises:
        RunStalled: it is none of the groups, or every one: the fault is not theirs.
    """
    reason = f"{cause}: the policy's log-probabilities of it are not finite"
    found = {number: reason for number, group in groups.items() if not finite({number: group})}
    if not found or len(found) == len(groups):
        raise RunStalled(
            f"no update can be made: {cause}, and the policy's log-probabilities are "
            + ("finite for each of its groups" if not found else "finite for none of its groups")
            + "; resume from an older checkpoint with a lower optimizer.lr, or with model.dtype=float32"
        )
    return found


class Tries:
    """How often in a row an update could not be made."""

    def __init__(self) -> None:
        self._failed = 0

    def made(self) -> None:
        self._failed = 0

    def failed(self, update: int, reasons: Mapping[int, str]) -> None:
        """Raise RunStalled after `MOST_TRIES`."""
        self._failed += 1
        if self._failed >= MOST_TRIES:
            group, reason = next(iter(reasons.items()))
            raise RunStalled(
                f"update {update} could not be made in {MOST_TRIES} tries, each with other groups; the last, "
                f"group {group}: {reason}"
            )
