"""Who takes part in which collective transfer: wishes, rounds, and the epochs of the groups that carry them.

A reader wishes for a version; the publisher makes a round of the wishes there are. Rounds of the same readers use one
process group; any other set of readers, or a group that has failed, makes a new epoch with a new group.

Invariants
- Epochs only grow, and a group never changes: a newcomer, a reader that left or one that hangs is a new epoch.
- Rank 0 is the publisher's; a reader has as many consecutive ranks as its engine has workers, in the readers' order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Wish:
    """A reader waits for the version with this locator, with `width` workers (tensor-parallel ranks)."""

    reader: str
    locator: str
    width: int


@dataclass(frozen=True)
class Round:
    """One transfer: a version's way to its readers through the group of an epoch.

    Attributes:
        number: grows with every round of a publisher. locator: of the version.
        epoch: of the group. host, port: where the group is formed. world: its size, the publisher included.
        meeting_port: where the members of this round check in, on the same host.
        first_ranks: by reader, the first of its ranks.
    """

    number: int
    locator: str
    epoch: str
    host: str
    port: int
    meeting_port: int
    world: int
    first_ranks: Mapping[str, int]


@dataclass(frozen=True)
class Group:
    """The group of an epoch: where it is formed and who is in it. `epoch` names it: number and publisher."""

    epoch: str
    host: str
    port: int
    members: tuple[Wish, ...]

    @property
    def world(self) -> int:
        return 1 + sum(member.width for member in self.members)

    @property
    def first_ranks(self) -> dict[str, int]:
        ranks, rank = {}, 1
        for member in self.members:
            ranks[member.reader] = rank
            rank += member.width
        return ranks


class Epochs:
    """The publisher's groups, one at a time."""

    def __init__(self, publisher: str) -> None:
        """`publisher` tells the groups of two publishers of one run apart."""
        self._publisher = publisher
        self._opened = 0
        self._rounds = 0
        self.group: Group | None = None

    def fits(self, wishes: Sequence[Wish]) -> bool:
        """Whether the present group is the one for these readers."""
        return self.group is not None and _shape(self.group.members) == _shape(wishes)

    def open(self, wishes: Sequence[Wish], host: str, port: int) -> Group:
        """The next epoch's group."""
        self._opened += 1
        members = tuple(sorted(wishes, key=lambda wish: wish.reader))
        self.group = Group(f"{self._publisher}-{self._opened}", host, port, members)
        return self.group

    def round(self, locator: str, meeting_port: int) -> Round:
        """The next round of the present group."""
        assert self.group is not None
        group = self.group
        self._rounds += 1
        return Round(
            self._rounds, locator, group.epoch, group.host, group.port, meeting_port, group.world, group.first_ranks
        )

    def drop(self) -> None:
        """The group has failed: whatever comes next is a new epoch."""
        self.group = None


def _shape(wishes: Sequence[Wish]) -> set[tuple[str, int]]:
    return {(wish.reader, wish.width) for wish in wishes}
