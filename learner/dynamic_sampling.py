"""Groups collected for an update, those left out, and the limits on how many may be.

Dynamic sampling (DAPO, arXiv:2503.14476, section 3.2) drops groups of equal reward and plays others in their place.

Invariants
- Whether a group is dropped is a pure function of its rewards, applied to the groups of the update's window only. So
  which groups are dropped, and which take their place, does not depend on what completes first.
- A dropped group is cancelled in Redis with `EQUAL_REWARDS` as the reason: its trajectories are deleted at once, the
  mark stays until a checkpoint covers it. A run resumed from an older checkpoint finds the mark and drops the group
  again, without playing it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from services.config.tree import LearnerConfig
from services.errors import RunStalled
from services.schemas import Trajectory

EQUAL_REWARDS = "all episodes have the same reward (learner.dynamic_sampling)"
TOLERANCE = 1e-8
"""Rewards that differ by less are equal up to rounding."""
WASTE_LIMIT = 4
"""Stop the run when one update has lost this many times the capacity: it makes no progress."""


def has_equal_rewards(group: Sequence[Trajectory]) -> bool:
    """Whether no episode of the group did better than another, so that group-relative advantages are all 0."""
    rewards = [trajectory.reward for trajectory in group]
    return max(rewards) - min(rewards) < TOLERANCE


@dataclass(slots=True)
class Collected:
    """Groups collected for one update.

    Attributes:
        groups: to train on, by number.
        stale: number of groups that were too old and issued again.
        unreadable: number of groups that could not be read and were issued again.
        cancelled: number of groups cancelled because tickets failed.
        equal: number of groups dropped for equal rewards.
        last_reason: why the last group was cancelled.
    """

    groups: dict[int, list[Trajectory]] = field(default_factory=dict)
    stale: int = 0
    unreadable: int = 0
    cancelled: int = 0
    equal: int = 0
    last_reason: str = ""

    def check_waste(self, config: LearnerConfig, capacity: int) -> None:
        """Raise RunStalled if too many groups were lost for the update ever to begin.

        Args:
            config: limits of dynamic sampling.
            capacity: largest number of outstanding groups.
        """
        if self.cancelled > WASTE_LIMIT * capacity:
            raise RunStalled(
                f"{self.cancelled} groups were cancelled while one update waited, the last: {self.last_reason}"
            )
        if self.stale > WASTE_LIMIT * capacity:
            raise RunStalled(f"{self.stale} groups of one update were too old to use; do the actors load new weights?")
        if self.unreadable > WASTE_LIMIT * capacity:
            raise RunStalled(
                f"{self.unreadable} groups of one update could not be read; do the actors run this release of the code?"
            )
        if self.equal > config.dynamic_sampling_limit * config.groups_per_update:
            raise RunStalled(
                f"{self.equal} groups were dropped for one update, more than learner.dynamic_sampling_limit allows: "
                "all episodes of each had the same reward; take tasks that are neither too hard nor too easy, larger "
                "groups, or learner.dynamic_sampling=false"
            )
