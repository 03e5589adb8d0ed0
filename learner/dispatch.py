"""Which groups are played, in which order, and how many at a time.

Invariants
- Group *i* plays task `f(seed, i)` (`services.tasks`). Tickets are pure functions of the configuration and the group's
  number, so issuing one again is a no-op.
- The whole state is a cursor (the next new group) and the set of outstanding groups: issued, and neither trained on nor
  dropped.
- At most `(max_staleness + 1) · groups_per_update` groups are outstanding. A slot is freed only when its group has been
  trained on or dropped, so with the window below no group waits longer than `max_staleness` updates for its turn: no
  group is stale by construction.
- The window of an update is the `groups_per_update` lowest-numbered outstanding groups: first in, first out. A learner
  that took whatever completes first would prefer short, easy episodes.

Example: groups_per_update=2, max_staleness=1, so 4 slots. `advance` fills free slots, `window` is what an update takes.

    event                         cursor  outstanding  window
    advance                       4       0 1 2 3      0 1
    update trains on 0 and 1      4       2 3          2 3
    advance                       6       2 3 4 5      2 3
    group 3 is cancelled          6       2 4 5        2 4
    advance                       7       2 4 5 6      2 4
    Redis lost 5: missing({2,4,6}) is 5, issued again under its number
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

from services.config.tree import Config
from services.schemas import TRAIN_STREAM, Task, Ticket
from services.tasks import TaskOrder


def ticket_seed(seed: int, stream: str, group: int, member: int) -> int:
    """Sampling seed of one episode, in [0, 2^31), computed from its identity alone.

    Args:
        seed: the run's.
        stream: the ticket's stream.
        group: number of the group.
        member: number within the group.
    """
    digest = hashlib.blake2b(f"{seed}/{stream}/{group}/{member}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


class Dispatcher:
    """State of the training stream. Knows nothing of Redis: the caller issues the tickets that it returns.

    Args:
        config: of the run.
        splits: sizes of the environments' splits, see `services.tasks`.
    """

    def __init__(self, config: Config, splits: Mapping[str, int]) -> None:
        self._config = config
        self._order = TaskOrder(config, splits)
        self._cursor = 0
        self._outstanding: set[int] = set()
        self._window: list[int] | None = None

    @property
    def outstanding(self) -> frozenset[int]:
        """Groups that were issued and neither trained on nor dropped."""
        return frozenset(self._outstanding)

    @property
    def capacity(self) -> int:
        """Largest number of outstanding groups."""
        learner = self._config.learner
        return (learner.max_staleness + 1) * learner.groups_per_update

    def task(self, group: int) -> Task:
        """Task of a group: `f(seed, i)`."""
        return self._order.task(group)

    def tickets(self, groups: Iterable[int]) -> list[Ticket]:
        """Tickets of all members of the groups, by group and member."""
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
        """Add new groups up to the capacity, but no more than the remaining updates can use; return them, ascending."""
        room = min(self.capacity, updates_left * self._config.learner.groups_per_update) - len(self._outstanding)
        new = list(range(self._cursor, self._cursor + max(0, room)))
        self._cursor += len(new)
        self._outstanding.update(new)
        self._window = None
        return new

    def window(self) -> list[int]:
        """The groups of the next update, ascending: the lowest-numbered outstanding ones."""
        if self._window is None:  # asked for at every completed group, but changes only with the groups that are out
            self._window = sorted(self._outstanding)[: self._config.learner.groups_per_update]
        return list(self._window)

    def missing(self, known: set[int]) -> list[int]:
        """Outstanding groups that are not in Redis, ascending. `known`: groups that are."""
        return sorted(self._outstanding - known)

    def finished(self, known: set[int]) -> list[int]:
        """Groups in Redis that were trained on or dropped, ascending. `known`: groups in Redis."""
        return sorted(group for group in known if group < self._cursor and group not in self._outstanding)

    def settle(self, groups: Sequence[int]) -> None:
        """Free the slots of groups that were trained on or dropped."""
        self._outstanding.difference_update(groups)
        self._window = None

    def state(self) -> dict[str, object]:
        """State as plain JSON data."""
        return {"cursor": self._cursor, "outstanding": sorted(self._outstanding)}

    def restore(self, state: Mapping[str, object]) -> None:
        """Continue from what `state` returned.

        Raises:
            ValueError: not such a state.
        """
        cursor, outstanding = state.get("cursor"), state.get("outstanding")
        if not isinstance(cursor, int) or not isinstance(outstanding, list):
            raise ValueError("not a dispatcher's state")
        self._cursor, self._outstanding = cursor, {int(group) for group in outstanding}
        self._window = None
