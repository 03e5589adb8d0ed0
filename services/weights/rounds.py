"""Members of collective transfers: requests, rounds, and the epochs of their process groups.

A reader requests a version. The publisher serves all current requests in one round. Rounds with the same readers share
a process group; another set of readers, or a failed group, starts a new epoch with a new group.

Invariants
- Epoch numbers only grow, and a group never changes: a reader that joins, leaves or hangs starts a new epoch.
- Rank 0 is the publisher. A reader has as many consecutive ranks as its engine has workers, in order of the readers'
  names.

Example: the publisher p, reader a with 2 workers, reader b with 4
    requests            epoch   ranks                    world
    a: v1               p-1     p 0, a 1-2               3      new group
    a: v2               p-1     p 0, a 1-2               3      same readers: round 2 in the same group
    a: v3, b: v3        p-2     p 0, a 1-2, b 3-6        7      b has joined: new group
    b: v4               p-3     p 0, b 1-4               5      a has left: new group
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    """The request of a reader for a version.

    Attributes:
        reader: its name.
        locator: of the version.
        width: number of workers of its engine (tensor-parallel ranks).
    """

    reader: str
    locator: str
    width: int


@dataclass(frozen=True)
class Membership:
    """What one receiver needs to take part in a round.

    Attributes:
        transport: `nccl`, `gloo` or `ipc`.
        epoch: name of the process group.
        host: address at which the group and the round gather, the publisher's.
        port: where the group is formed.
        check_in_port: where the members of this round check in before any weight is sent.
        check_in_timeout_s: how long they wait there for one another, in seconds.
        first_rank: the first of the receiver's ranks, one for each worker of its engine.
        world: number of ranks of the group, the publisher's rank 0 included.
    """

    transport: str
    epoch: str
    host: str
    port: int
    check_in_port: int
    check_in_timeout_s: float
    first_rank: int
    world: int


@dataclass(frozen=True)
class Round:
    """One transfer of a version through the group of an epoch.

    Attributes:
        number: grows with every round of a publisher.
        locator: of the version.
        epoch: name of the process group.
        host: address of the publisher, where the group is formed.
        port: where the group is formed.
        check_in_port: where the members of this round check in, on the same host.
        world: number of ranks of the group, the publisher included.
        first_ranks: by reader, the first of its ranks.
    """

    number: int
    locator: str
    epoch: str
    host: str
    port: int
    check_in_port: int
    world: int
    first_ranks: Mapping[str, int]

    def membership(self, reader: str, transport: str, check_in_timeout_s: float) -> Membership:
        """What `reader`, one of `first_ranks`, needs to take part."""
        return Membership(
            transport=transport,
            epoch=self.epoch,
            host=self.host,
            port=self.port,
            check_in_port=self.check_in_port,
            check_in_timeout_s=check_in_timeout_s,
            first_rank=self.first_ranks[reader],
            world=self.world,
        )


@dataclass(frozen=True)
class Group:
    """The process group of an epoch.

    Attributes:
        epoch: its name: publisher and number.
        host: address of the publisher, where it is formed.
        port: where it is formed.
        members: the requests of its readers, in the order of their ranks.
    """

    epoch: str
    host: str
    port: int
    members: tuple[Request, ...]

    @property
    def world(self) -> int:
        """Number of ranks, the publisher included."""
        return 1 + sum(member.width for member in self.members)

    @property
    def first_ranks(self) -> dict[str, int]:
        """By reader, the first of its ranks."""
        ranks, rank = {}, 1
        for member in self.members:
            ranks[member.reader] = rank
            rank += member.width
        return ranks


class Epochs:
    """The publisher's process groups, one at a time."""

    def __init__(self, publisher: str) -> None:
        """`publisher` distinguishes the groups of two publishers of one run."""
        self._publisher = publisher
        self._opened = 0
        self._rounds = 0
        self.group: Group | None = None

    def fits(self, requests: Sequence[Request]) -> bool:
        """Whether the current group consists of exactly these readers."""
        return self.group is not None and _shape(self.group.members) == _shape(requests)

    def open(self, requests: Sequence[Request], host: str, port: int) -> Group:
        """Start the next epoch; its group."""
        self._opened += 1
        members = tuple(sorted(requests, key=lambda request: request.reader))
        self.group = Group(f"{self._publisher}-{self._opened}", host, port, members)
        return self.group

    def round(self, locator: str, check_in_port: int) -> Round:
        """Start the next round in the current group."""
        assert self.group is not None
        group = self.group
        self._rounds += 1
        return Round(
            self._rounds, locator, group.epoch, group.host, group.port, check_in_port, group.world, group.first_ranks
        )

    def drop(self) -> None:
        """Forget the current group, which has failed: the next round starts a new epoch."""
        self.group = None


def _shape(requests: Sequence[Request]) -> set[tuple[str, int]]:
    return {(request.reader, request.width) for request in requests}
