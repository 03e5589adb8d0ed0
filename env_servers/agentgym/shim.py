"""AgentGym's environments: created first, reset to any task any number of times, and named by numbers.

Invariants
- An environment holds at most one session of the table; a reset closes the one before.
- There are at most as many environments as sessions; those that are idle for too long are removed.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from env_servers.environment import Environment
from env_servers.protocol import ResetRequest, StepRequest, StepResult
from env_servers.sessions.ids import new_number
from env_servers.sessions.table import Busy, Conflict, SessionTable, SessionUnknown


@dataclass(slots=True)
class Slot:
    """One environment.

    Attributes:
        used_at: the clock at its last use.
        last: its last result; None before its first reset.
    """

    used_at: float
    last: StepResult | None = None


class Shim:
    """AgentGym's calls on a session table. Raises what the table raises."""

    def __init__(
        self, table: SessionTable, worker: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._table = table
        self._worker = worker
        self._clock = clock
        self._slots: dict[int, Slot] = {}

    def create(self) -> int:
        """Create an environment and return its number. Raises Busy."""
        now = self._clock()
        most = self._table.info.max_sessions
        if len(self._slots) >= most:
            self._forget(now - self._table.info.idle_seconds)
        if len(self._slots) >= most:
            raise Busy(f"all {most} environments are in use: retry later, or raise --max-sessions")
        number = new_number(self._worker)
        self._slots[number] = Slot(now)
        return number

    async def reset(self, number: int, task: int | None) -> StepResult:
        """Start the task with index `task`, counted through all splits in order; None: a random one."""
        slot = self._find(number)
        request = self._request(task)
        self._end(slot)
        slot.last = await self._table.reset(request)
        return slot.last

    async def step(self, number: int, action: str) -> StepResult:
        slot = self._find(number)
        last = self._last(slot)
        request = StepRequest(session=last.session, step=last.step + 1, action=action)
        slot.last = await self._table.step(request)
        return slot.last

    def last(self, number: int) -> StepResult:
        """The environment's last result. Raises Conflict before its first reset."""
        return self._last(self._find(number))

    def environment(self, number: int) -> Environment:
        """The environment itself. Raises Conflict before its first reset, SessionUnknown once its session is gone."""
        return self._table.environment(self.last(number).session)

    def close(self, number: int) -> None:
        """Remove an environment and close its session."""
        self._end(self._find(number))
        del self._slots[number]

    def _find(self, number: int) -> Slot:
        slot = self._slots.get(number)
        if slot is None:
            raise SessionUnknown("no such environment: create one first")
        slot.used_at = self._clock()
        return slot

    @staticmethod
    def _last(slot: Slot) -> StepResult:
        if slot.last is None:
            raise Conflict("the environment has no task yet: reset it first")
        return slot.last

    def _end(self, slot: Slot) -> None:
        if slot.last is not None:
            with suppress(SessionUnknown):
                self._table.close(slot.last.session)
            slot.last = None

    def _forget(self, before: float) -> None:
        for number in [number for number, slot in self._slots.items() if slot.used_at < before]:
            self._end(self._slots.pop(number))

    def _request(self, task: int | None) -> ResetRequest:
        splits = self._table.info.splits
        if task is None:
            task = random.randrange(max(1, sum(splits.values())))
        index = task
        for split, size in splits.items():
            if index < size:
                return ResetRequest(split=split, index=index)
            index -= size
        last_split, size = list(splits.items())[-1]
        return ResetRequest(split=last_split, index=size + index)
