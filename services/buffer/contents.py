"""The place of every ticket of a run, as plain data for `anchorage buffer inspect`, dashboards and tests.

Invariants
- A ticket is waiting, leased, stored, or dropped (given up, or of a cancelled group).
- A group is open, complete or cancelled.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from services.buffer import keys

State = Literal["open", "complete", "cancelled"]


@dataclass(frozen=True, slots=True)
class TicketContents:
    """One ticket of a group.

    Attributes:
        member: its number in the group.
        place: where it is.
        holder: the actor that leases it.
        lease_s: seconds left of the lease, negative once it has expired.
        nbytes: size of its stored trajectory.
        attempts: number of failed attempts so far.
    """

    member: int
    place: Literal["waiting", "leased", "stored"]
    holder: str | None = None
    lease_s: float | None = None
    nbytes: int = 0
    attempts: int = 0


@dataclass(frozen=True, slots=True)
class Lease:
    """A ticket that an actor plays.

    Attributes:
        stream, group, member: of the ticket.
        holder: the actor.
        left_s: seconds left of the lease, negative once it has expired.
        attempts: number of failed attempts so far.
    """

    stream: str
    group: int
    member: int
    holder: str
    left_s: float
    attempts: int


@dataclass(frozen=True, slots=True)
class GroupContents:
    """One group.

    Attributes:
        stream: its stream.
        group: its number in the stream.
        size: number of its members.
        state: open, complete or cancelled.
        tickets: in member order, without those given up; empty for a cancelled group.
        reason: why it was cancelled.
    """

    stream: str
    group: int
    size: int
    state: State
    tickets: tuple[TicketContents, ...]
    reason: str | None = None

    @property
    def nbytes(self) -> int:
        """Size of all stored trajectories."""
        return sum(ticket.nbytes for ticket in self.tickets)


def parse_contents(
    now: int,
    sizes: Sequence[bytes],
    complete: Sequence[bytes],
    reasons: Sequence[bytes],
    waiting: Sequence[bytes],
    holders: Sequence[bytes],
    leases: Sequence[bytes],
    stored: Sequence[bytes],
    attempts: Sequence[bytes],
) -> list[GroupContents]:
    """Parse the reply of `contents.lua`, sorted in the order in which tickets are leased. `now`: ms."""
    known, why = _pairs(sizes), _pairs(reasons)
    held, ends, tried = _pairs(holders), _pairs(leases), _pairs(attempts)
    of_group: defaultdict[bytes, list[TicketContents]] = defaultdict(list)
    for field in waiting:
        group, member = keys.split_ticket(field)
        of_group[group].append(TicketContents(member, "waiting", attempts=int(tried.get(field, 0))))
    for field, holder in held.items():
        group, member = keys.split_ticket(field)
        left = (float(ends[field]) - now) / 1000
        of_group[group].append(
            TicketContents(member, "leased", holder.decode(), left, attempts=int(tried.get(field, 0)))
        )
    for field, nbytes in _pairs(stored).items():
        group, member = keys.split_ticket(field)
        of_group[group].append(TicketContents(member, "stored", nbytes=int(nbytes)))
    full = set(complete)
    return [
        GroupContents(
            *keys.parse_group(field),
            size=int(size),
            state="cancelled" if field in why else "complete" if field in full else "open",
            tickets=tuple(sorted(of_group[field], key=lambda ticket: ticket.member)),
            reason=why[field].decode() if field in why else None,
        )
        for field, size in sorted(known.items())
    ]


def parse_leases(now: int, total: int, *rows: bytes) -> tuple[list[Lease], int]:
    """Parse the reply of `leases.lua`: the leases, and the number of all. `now`: ms."""
    leases = []
    for field, holder, end, attempts in zip(*(rows[place::4] for place in range(4)), strict=True):
        group, member = keys.split_ticket(field)
        left = (float(end) - now) / 1000
        leases.append(Lease(*keys.parse_group(group), member, holder.decode(), left, int(attempts)))
    return leases, total


def _pairs(flat: Sequence[bytes]) -> dict[bytes, bytes]:
    return dict(zip(flat[::2], flat[1::2], strict=True))
