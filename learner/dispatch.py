"""Which groups are played, in which order, and how many at a time.

Invariants
- Group *i* plays task `f(seed, i)` (`services.tasks`). Tickets are pure functions of the configuration and the group's
  number, so issuing one again is a no-op.
- The whole state is a cursor (the next new group) and the set of groups that are out.
- At most `(max_staleness + 1) · groups_per_update` groups are out. A slot is freed only when its group has been
  trained on or dropped, so with the window below no group waits longer than `max_staleness` updates for its turn:
  nothing is born stale.
- The window of an update is the `groups_per_update` lowest-numbered groups that are out: first in, first out. A learner
  that took whatever completes first would prefer short, easy episodes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

from services.config.tree import Config
from services.schemas import TRAIN_STREAM, Task, Ticket
from services.tasks import TaskOrder


def ticket_seed(seed: int, stream: str, group: int, member: int) -> int:
    """31-bit seed of one episode's sampling, computed from its identity."""
    digest = hashlib.blake2b(f"{seed}/{stream}/{group}/{member}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


class Dispatcher:
    """State of the training stream. Knows no Redis: the caller issues what it answers."""

    def __init__(self, config: Config, splits: Mapping[str, int]) -> None:
        self._config = config
        self._order = TaskOrder(config, splits)
        self._cursor = 0
        self._outstanding: set[int] = set()

    @property
    def outstanding(self) -> frozenset[int]:
        return frozenset(self._outstanding)

    @property
    def capacity(self) -> int:
        """Most groups that may be out."""
        learner = self._config.learner
        return (learner.max_staleness + 1) * learner.groups_per_update

    def task(self, group: int) -> Task:
        """The task of group `group`: `f(seed, i)`."""
        return self._order.task(group)

    def tickets(self, groups: Iterable[int]) -> list[Ticket]:
        """Tickets of all members of the groups, in order."""
        size, seed = self._config.learner.group_size, self._config.run.seed
        return [
            Ticket(
                stream=TRAIN_STREAM,
                group=group,
                member=member,
                group_size=size,
                task=self.task(group),
                seed=ticket_seed(seed, TRAIN_STREAM, group, member),
                temperature=self._config.rollout.temperature,
            )
            for group in sorted(groups)
            for member in range(size)
        ]

    def advance(self, updates_left: int) -> list[int]:
        """New groups that now go out: up to the capacity, and no more than the updates left can use."""
        room = min(self.capacity, updates_left * self._config.learner.groups_per_update) - len(self._outstanding)
        new = list(range(self._cursor, self._cursor + max(0, room)))
        self._cursor += len(new)
        self._outstanding.update(new)
        return new

    def window(self) -> list[int]:
        """The groups of the next update, ascending: the lowest-numbered that are out."""
        return sorted(self._outstanding)[: self._config.learner.groups_per_update]

    def missing(self, known: set[int]) -> list[int]:
        """Groups that are out but that Redis has lost, ascending."""
        return sorted(self._outstanding - known)

    def finished(self, known: set[int]) -> list[int]:
        """Groups in Redis that are behind the cursor and no longer out: trained on or dropped, ascending."""
        return sorted(group for group in known if group < self._cursor and group not in self._outstanding)

    def settle(self, groups: Sequence[int]) -> None:
        """The groups were trained on, or are given up: their slots are free."""
        self._outstanding.difference_update(groups)

    def state(self) -> dict[str, object]:
        """JSON-able state."""
        return {"cursor": self._cursor, "outstanding": sorted(self._outstanding)}

    def restore(self, state: Mapping[str, object]) -> None:
        """Take up what `state` answered.

        Raises:
            ValueError: not such a state.
        """
        cursor, outstanding = state.get("cursor"), state.get("outstanding")
        if not isinstance(cursor, int) or not isinstance(outstanding, list):
            raise ValueError("not a dispatcher's state")
        self._cursor, self._outstanding = cursor, {int(group) for group in outstanding}
