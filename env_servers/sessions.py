"""The sessions of one environment: open, step, close, expire. No HTTP, no clock of its own beyond `clock`.

Invariants
- A table belongs to one event loop. An environment is called by one step at a time: on the loop itself, or, where it is
  `blocking`, in a pool of threads.
- A step that has begun runs to its end even if whoever asked for it goes away; its answer is kept for the repeat.
- Live sessions, calls waiting for a worker and remembered dead sessions are all bounded.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from env_servers.environment import Environment, Observation, TaskError
from env_servers.protocol import AnchorKind, EnvInfo, ResetRequest, StepRequest, StepResult

logger = logging.getLogger(__name__)

T = TypeVar("T")
Ending = Literal["closed", "expired", "failed"]

REMEMBERED = 1024
"""Ended sessions that are still told apart from ones that never were."""
SWEEP_FRACTION = 0.25
"""Share of the idle limit between two sweeps for idle sessions."""


class SessionError(Exception):
    """Base of what the table refuses. The message is one line for the caller."""


class SessionUnknown(SessionError):
    """No such live session. `ending` says what became of it, where that is still remembered."""

    def __init__(self, message: str, ending: Ending | None = None) -> None:
        super().__init__(message)
        self.ending = ending


class Conflict(SessionError):
    """The step's number is neither the next one nor the last one, or the episode is over."""


class Busy(SessionError):
    """All session slots are taken. `retry_after_s`: when to try again."""

    retry_after_s = 1


class AnchorUnsupported(SessionError):
    """The environment has no anchor of the kind that was asked for."""


class EnvironmentFault(SessionError):
    """The environment itself failed: an unexpected exception or an impossible answer. Its session is gone."""


@dataclass(slots=True)
class TableCounts:
    """What has happened since the table was made."""

    resets: int = 0
    steps: int = 0
    repeats: int = 0
    expired: int = 0
    faults: int = 0


class Session:
    """One live episode. `last` answers a repeat of step number `steps`."""

    __slots__ = ("anchor", "environment", "id", "last", "max_steps", "running", "steps", "used_at")

    def __init__(
        self, identity: str, environment: Environment, request: ResetRequest, last: Observation, used_at: float
    ) -> None:
        self.id = identity
        self.environment = environment
        self.anchor: AnchorKind = request.anchor
        self.max_steps = request.max_steps
        self.last = last
        self.steps = 0
        self.running: asyncio.Future[StepResult] | None = None
        self.used_at = used_at

    @property
    def done(self) -> bool:
        return self.last.terminated or self.last.truncated

    def result(self) -> StepResult:
        last = self.last
        return StepResult(
            session=self.id,
            step=self.steps,
            observation=last.text,
            reward=last.reward,
            terminated=last.terminated,
            truncated=last.truncated,
            admissible=None if last.admissible is None else list(last.admissible),
            anchor=last.state if self.anchor == "state" else last.text,
            facts=dict(last.facts),
            expert=last.expert,
        )


class SessionTable:
    """All sessions of one environment class.

    Args:
        factory: makes the environment of a new session.
        max_sessions: live sessions at the same time; a further reset raises `Busy`.
        idle_seconds: a session unused for this long is closed.
        threads: for a blocking environment; others use none.
        prefix: what the sessions' ids begin with; it names the process that holds them.
        clock: seconds that never run backwards.

    Attributes:
        info: what the table serves.
        counts: what has happened so far.
    """

    def __init__(
        self,
        factory: type[Environment],
        *,
        max_sessions: int = 4096,
        idle_seconds: float = 600.0,
        threads: int = 8,
        prefix: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counts = TableCounts()
        self.info = EnvInfo(
            name=factory.name,
            version=factory.version,
            splits=dict(factory.splits()),
            max_sessions=max_sessions,
            idle_seconds=idle_seconds,
            batching=not factory.blocking,
            **factory.about(),
        )
        self._factory = factory
        self._prefix = prefix
        self._clock = clock
        self._executor = ThreadPoolExecutor(threads, f"{factory.name}-session") if factory.blocking else None
        self._sessions: dict[str, Session] = {}
        self._ended: OrderedDict[str, Ending] = OrderedDict()
        self._opening = 0
        self._stopped = False
        self._swept_at = clock()

    @property
    def live(self) -> int:
        return len(self._sessions)

    async def reset(self, request: ResetRequest) -> StepResult:
        """Open a session on the request's task.

        Raises:
            Busy: no slot is free. TaskError: the task is unknown or broken.
            AnchorUnsupported: no anchor of that kind. EnvironmentFault: the environment failed.
        """
        self._admit()
        if self._executor is None:
            return await self._open(request)
        return await asyncio.shield(asyncio.ensure_future(self._open(request)))

    async def step(self, request: StepRequest) -> StepResult:
        """Take the next action, or answer the last one again.

        Raises:
            SessionUnknown: no such live session. Conflict: wrong step number, or the episode is over.
            EnvironmentFault: the environment failed; the session is gone.
        """
        session = self._find(request.session)
        if session.running is not None:
            if request.step != session.steps + 1:
                raise Conflict(f"step {request.step} came while step {session.steps + 1} is still being taken")
            self.counts.repeats += 1
            return await asyncio.shield(session.running)
        session.used_at = self._clock()
        if request.step == session.steps:
            self.counts.repeats += 1
            return session.result()
        if request.step != session.steps + 1:
            raise Conflict(f"step {request.step} is out of order: the session's next step is {session.steps + 1}")
        if session.done:
            raise Conflict(f"the episode ended with step {session.steps}: reset to start another")
        if self._executor is None:
            return await self._take(session, request.action)
        session.running = asyncio.ensure_future(self._take(session, request.action))
        return await asyncio.shield(session.running)

    def close(self, session_id: str) -> None:
        """End a session; one that has already ended is left at that.

        Raises:
            SessionUnknown: there was no such session, as far as is remembered.
        """
        session = self._sessions.get(session_id)
        if session is not None:
            self._end(session, "closed")
        elif session_id not in self._ended:
            raise SessionUnknown("no such session")

    def expire(self) -> int:
        """Close the sessions that have been idle too long and say how many there were."""
        now = self._swept_at = self._clock()
        idle = [session for session in self._sessions.values() if self._is_idle(session, now)]
        for session in idle:
            self._end(session, "expired")
        return len(idle)

    def shutdown(self) -> None:
        """End every session. The table takes no more calls; those under way end on their own."""
        for session in list(self._sessions.values()):
            self._end(session, "closed")
        self._stopped = True
        if self._executor is not None:
            self._executor.shutdown(wait=False)

    def _admit(self) -> None:
        if self._stopped:
            raise Busy("the server is stopping: try again, or another server")
        if self._clock() - self._swept_at > self.info.idle_seconds * SWEEP_FRACTION:
            self.expire()
        if self.live + self._opening >= self.info.max_sessions:
            self.expire()
        if self.live + self._opening >= self.info.max_sessions:
            raise Busy(f"all {self.info.max_sessions} sessions are in use: try again, or start another server")

    def _find(self, session_id: str) -> Session:
        session = self._sessions.get(session_id)
        if session is not None and self._is_idle(session, self._clock()):
            self._end(session, "expired")
            session = None
        if session is not None:
            return session
        ending = self._ended.get(session_id)
        if ending is None:
            raise SessionUnknown("no such session: reset to start one")
        raise SessionUnknown(f"the session is gone ({ending}): reset to start another", ending)

    def _is_idle(self, session: Session, now: float) -> bool:
        return session.running is None and now - session.used_at > self.info.idle_seconds

    async def _open(self, request: ResetRequest) -> StepResult:
        self._opening += 1
        try:
            session = await self._call(lambda: self._start(request))
        except Exception as error:
            raise self._blame(error, f"reset of {request.split}/{request.index}") from error
        finally:
            self._opening -= 1
        self._sessions[session.id] = session
        self.counts.resets += 1
        if self._stopped:
            self._end(session, "closed")
        return session.result()

    def _start(self, request: ResetRequest) -> Session:
        environment = self._factory()
        try:
            observation = _checked(environment.reset(request.split, request.index, expert=request.expert))
            if request.anchor == "state" and not observation.state:
                raise AnchorUnsupported(f"{self._factory.name} gives no state digest: use anchor 'observation'")
            session = Session(
                self._prefix + secrets.token_urlsafe(16), environment, request, observation, self._clock()
            )
            session.result().model_dump_json()  # facts that are no JSON are found out here, not by the client
        except BaseException:
            _close(environment)
            raise
        return session

    async def _take(self, session: Session, action: str) -> StepResult:
        number = session.steps + 1
        try:
            observation = await self._call(lambda: _checked(session.environment.step(action)))
            session.steps = number
            session.last = _limited(observation, number, session.max_steps)
            result = session.result()
        except Exception as error:
            self._end(session, "failed")
            raise self._blame(error, f"step {number}") from error
        finally:
            session.running = None
            session.used_at = self._clock()
        self.counts.steps += 1
        return result

    def _blame(self, error: Exception, doing: str) -> Exception:
        if isinstance(error, (TaskError, SessionError)):
            return error
        self.counts.faults += 1
        logger.error("environment %s failed at %s", self._factory.name, doing, exc_info=error)
        return EnvironmentFault(f"the environment failed at {doing}: {type(error).__name__}; see the server's log")

    def _end(self, session: Session, ending: Ending) -> None:
        if self._sessions.pop(session.id, None) is None:
            return
        self._ended[session.id] = ending
        if len(self._ended) > REMEMBERED:
            self._ended.popitem(last=False)
        self.counts.expired += ending == "expired"
        if session.running is None or ending == "failed":
            self._release(session.environment)
        else:
            session.running.add_done_callback(lambda _: self._release(session.environment))

    def _release(self, environment: Environment) -> None:
        if self._executor is None or self._stopped:
            _close(environment)
        else:
            self._executor.submit(_close, environment)

    async def _call(self, function: Callable[[], T]) -> T:
        if self._executor is None:
            return function()
        return await asyncio.get_running_loop().run_in_executor(self._executor, function)


def _checked(observation: Observation) -> Observation:
    if not math.isfinite(observation.reward):
        raise ValueError(f"the environment gave the reward {observation.reward}")
    return observation


def _limited(observation: Observation, steps: int, max_steps: int | None) -> Observation:
    """A task that ends by its own rules is not truncated, whatever the limits say."""
    truncated = not observation.terminated and (observation.truncated or steps == max_steps)
    return observation if truncated == observation.truncated else replace(observation, truncated=truncated)


def _close(environment: Environment) -> None:
    try:
        environment.close()
    except Exception:
        logger.exception("environment %s failed at close", environment.name)
