"""What came in for an update, what of it is not used, and when too much of it is not.

Dynamic sampling (DAPO, arXiv:2503.14476, section 3.2) drops the groups of equal reward and plays others in their place.

Invariants
- Whether a group is dropped is a pure function of its rewards, asked for the groups of the update's window only. So
  which groups are dropped, and which take their place, does not depend on what completes first.
- A dropped group is cancelled in Redis with `EQUAL_REWARDS` as the reason: its trajectories are gone at once, the mark
  stays until the checkpoint behind it. A run that goes on from an older checkpoint finds the mark and drops the group
  again, unplayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from services.config.tree import LearnerConfig
from services.errors import RunStalled
from services.schemas import Trajectory

EQUAL_REWARDS = "all episodes have the same reward (learner.dynamic_sampling)"
TOLERANCE = 1e-8
"""Rewards that differ by less are equal on paper."""
WASTE_LIMIT = 4
"""Give up when so many times the capacity was cancelled or stale in one update: the run does not get anywhere."""


def has_equal_rewards(group: Sequence[Trajectory]) -> bool:
    """No episode of the group did better than another: nothing to learn from relative to the group."""
    rewards = [trajectory.reward for trajectory in group]
    return max(rewards) - min(rewards) < TOLERANCE


@dataclass(slots=True)
class Collected:
    """Groups to train on by number, and how many were not used: too old, unreadable, cancelled, of equal rewards."""

    groups: dict[int, list[Trajectory]] = field(default_factory=dict)
    stale: int = 0
    unreadable: int = 0
    cancelled: int = 0
    equal: int = 0
    last_reason: str = ""

    def check_waste(self, config: LearnerConfig, capacity: int) -> None:
        """Raise `RunStalled` where the update would wait for ever; `capacity` groups may be out."""
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
