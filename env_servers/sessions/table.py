"""The sessions of one environment: open, step, close, expire. No HTTP; the only clock is `clock`.

Invariants
- A table belongs to one event loop. An environment is called by one step at a time: on the loop itself or, if it is
  `blocking`, in a thread with a time limit.
- A step that has started runs to its end even if its caller is cancelled; its result is kept for a repeat.
- Every result can be written as JSON. An environment that returns anything else loses its own session only.
- Live sessions, threads and remembered ended sessions are bounded.

How sessions and steps are numbered: a session's id is random, and the client numbers its steps from 1. That makes
retries safe without any other state. Example, for a session after a reset and two steps (`steps` is 2)::

    the client asks for    the table answers
    step 3                 takes the action, `steps` becomes 3
    step 2                 a repeat: the result of step 2 again, nothing is taken
    step 1, step 4         Conflict (409): out of order
    step 3, while step 3   the same result as the first request, which takes the action
      is running
    step 3, at the end     Conflict (409): the episode has ended; step 2 is still repeated
    any step, once closed  SessionUnknown: 410 as long as the id is among the `REMEMBERED`, 404 afterwards
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from env_servers.environment import Environment, TaskError
from env_servers.protocol import MAX_ACTION_CHARS, EnvInfo, ResetRequest, StepRequest, StepResult
from env_servers.sessions.calls import BlockingCalls, CallTimeout, NoThread
from env_servers.sessions.session import Session, WrongValue, checked, close_environment, limited, sendable
from env_servers.sessions.watch import LoopCall

logger = logging.getLogger(__name__)

T = TypeVar("T")
Ending = Literal["closed", "expired", "failed"]

REMEMBERED = 1024
"""Number of ended sessions that are told apart from unknown ones."""
SWEEP_FRACTION = 0.25
"""Interval between two sweeps for idle sessions, as a share of the idle limit."""
CALL_SECONDS = 120.0
"""Default time limit of one call of a blocking environment."""
CLOSING_S = 2.0
"""How long a shutdown waits for running steps, and then again for environments to close."""


class SessionError(Exception):
    """Base of the table's errors. The message is one line for the client."""


class SessionUnknown(SessionError):
    """No such live session.

    Attributes:
        ending: how it ended; None: not remembered, or it never existed.
    """

    def __init__(self, message: str, ending: Ending | None = None) -> None:
        super().__init__(message)
        self.ending = ending


class Conflict(SessionError):
    """The step number is neither the next nor the last one, or the episode is over."""


class Busy(SessionError):
    """No session slot or no thread is free.

    Attributes:
        retry_after_s: seconds after which a client should retry.
    """

    retry_after_s = 1


class AnchorUnsupported(SessionError):
    """The environment does not offer the requested kind of anchor."""


class EnvironmentFault(SessionError):
    """The environment failed: an unexpected exception, an invalid observation, or a timeout. Its session is gone."""


@dataclass(slots=True)
class TableCounts:
    """Events since the table was created.

    Attributes:
        resets: sessions opened.
        steps: actions taken.
        repeats: steps that were answered again.
        expired: sessions closed because they were idle.
        faults: failures of the environment.
    """

    resets: int = 0
    steps: int = 0
    repeats: int = 0
    expired: int = 0
    faults: int = 0


class SessionTable:
    """All sessions of one environment class.

    Args:
        factory: the environment class; one instance a session.
        max_sessions: maximum number of live sessions; a further reset raises `Busy`.
        idle_seconds: a session that is idle for this long is closed.
        threads: maximum number of concurrent calls of a blocking environment; others use no threads.
        call_seconds: time limit of a call of a blocking environment. A longer call fails its session.
        prefix: prefix of the session ids, which names the process that holds them.
        clock: monotonic clock, in seconds.

    Attributes:
        info: what the table serves.
        counts: events so far.
        on_loop: the call that runs on the event loop, see `env_servers.sessions.watch`.

    Raises:
        TaskError: the environment cannot offer its tasks.
    """

    def __init__(
        self,
        factory: type[Environment],
        *,
        max_sessions: int = 4096,
        idle_seconds: float = 600.0,
        threads: int = 8,
        call_seconds: float = CALL_SECONDS,
        prefix: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counts = TableCounts()
        self.on_loop = LoopCall(factory.name)
        self.info = EnvInfo(
            name=factory.name,
            version=factory.version,
            splits=dict(factory.splits()),
            max_sessions=max_sessions,
            idle_seconds=idle_seconds,
            action_form=factory.action_form,
            max_action_chars=MAX_ACTION_CHARS,
            batching=not factory.blocking,
            **factory.about(),
        )
        self._factory = factory
        self._prefix = prefix
        self._clock = clock
        self._calls = BlockingCalls(f"{factory.name}-session", threads, call_seconds) if factory.blocking else None
        self._closing: set[asyncio.Task[None]] = set()
        self._sessions: dict[str, Session] = {}
        self._ended: OrderedDict[str, Ending] = OrderedDict()
        self._opening = 0
        self._stopped = False
        self._swept_at = clock()

    @property
    def live(self) -> int:
        return len(self._sessions)

    @property
    def hung(self) -> int:
        """Abandoned calls that still hold a thread."""
        return 0 if self._calls is None else self._calls.given_up

    async def reset(self, request: ResetRequest) -> StepResult:
        """Open a session on the request's task.

        Raises:
            Busy: no slot or no thread is free.
            TaskError: the task is unknown or broken.
            AnchorUnsupported: the environment does not offer that anchor.
            EnvironmentFault: the environment failed.
        """
        self._admit()
        if self._calls is None:
            return await self._open(request)
        return await asyncio.shield(asyncio.ensure_future(self._open(request)))

    async def step(self, request: StepRequest) -> StepResult:
        """Take the next action, or return the last result again.

        Raises:
            SessionUnknown: no such live session.
            Conflict: wrong step number, or the episode is over.
            EnvironmentFault: the environment failed; the session is gone.
            Busy: no thread was free in time; the action was not taken.
        """
        session = self._find(request.session)
        if session.running is not None:
            if request.step != session.steps + 1:
                raise Conflict(f"step {request.step} is out of order: step {session.steps + 1} is still being taken")
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
        if self._calls is None:
            return await self._take(session, request.action)
        session.running = asyncio.ensure_future(self._take(session, request.action))
        return await asyncio.shield(session.running)

    def environment(self, session_id: str) -> Environment:
        """The environment of a live session, for what the step API does not offer. Raises SessionUnknown."""
        return self._find(session_id).environment

    def close(self, session_id: str) -> None:
        """Close a session. A session that has already ended is no error.

        Raises:
            SessionUnknown: no such session, as far as is remembered.
        """
        session = self._sessions.get(session_id)
        if session is not None:
            self._end(session, "closed")
        elif session_id not in self._ended:
            raise SessionUnknown("no such session")

    def expire(self) -> int:
        """Close the sessions that are idle for too long; returns their number."""
        now = self._swept_at = self._clock()
        idle = [session for session in self._sessions.values() if self._is_idle(session, now)]
        for session in idle:
            self._end(session, "expired")
        return len(idle)

    async def shutdown(self) -> None:
        """Close all sessions and accept no more calls. Waits for running ones, up to twice `CLOSING_S`."""
        running = [session.running for session in self._sessions.values() if session.running is not None]
        for session in list(self._sessions.values()):
            self._end(session, "closed")
        self._stopped = True
        for waiting in (running, self._closing):
            if waiting:
                await asyncio.wait(waiting, timeout=CLOSING_S)

    def _admit(self) -> None:
        if self._stopped:
            raise Busy("the server is stopping: retry later")
        if self._calls is not None and self._calls.exhausted:
            raise Busy(f"{self.hung} calls of the environment hang and hold its threads: retry later")
        if self._clock() - self._swept_at > self.info.idle_seconds * SWEEP_FRACTION:
            self.expire()
        if self.live + self._opening >= self.info.max_sessions:
            self.expire()
        if self.live + self._opening >= self.info.max_sessions:
            raise Busy(f"all {self.info.max_sessions} sessions are in use: retry later, or raise --max-sessions")

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
            session = await self._call(lambda: self._start(request), _close_late, "a reset")
        except Exception as error:
            raise self._fault_of(error, f"reset of {request.split}/{request.index}") from error
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
            observation = checked(environment.reset(request.split, request.index, expert=request.expert))
            if request.anchor == "state" and not observation.state:
                raise AnchorUnsupported(f"{self._factory.name} has no state digest: use anchor 'observation'")
            session = Session(
                self._prefix + secrets.token_urlsafe(16), environment, request, observation, self._clock()
            )
            sendable(session.result())
        except BaseException:
            close_environment(environment)
            raise
        return session

    async def _take(self, session: Session, action: str) -> StepResult:
        number = session.steps + 1
        environment = session.environment
        try:
            observation = await self._call(
                lambda: checked(environment.step(action)), lambda _: close_environment(environment), "a step"
            )
            session.steps = number
            session.last = limited(observation, number, session.max_steps)
            result = sendable(session.result())
        except NoThread as error:
            raise Busy(f"{error}: retry later") from error
        except Exception as error:
            session.hung = isinstance(error, CallTimeout)
            self._end(session, "failed")
            raise self._fault_of(error, f"step {number}") from error
        finally:
            session.running = None
            session.used_at = self._clock()
        self.counts.steps += 1
        return result

    def _fault_of(self, error: Exception, doing: str) -> Exception:
        """The error for the client. What it must not see is logged."""
        if isinstance(error, (TaskError, SessionError)):
            return error
        if isinstance(error, NoThread):
            return Busy(f"{error}: retry later")
        self.counts.faults += 1
        if isinstance(error, CallTimeout):
            logger.error("environment %s at %s: %s", self._factory.name, doing, error)
            return EnvironmentFault(f"the environment failed at {doing}: {error} (--call-seconds)")
        if isinstance(error, WrongValue):
            logger.error("environment %s at %s: %s", self._factory.name, doing, error)
            return EnvironmentFault(f"{error} (at {doing})")
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
            self._release(session)
        else:
            session.running.add_done_callback(lambda _: self._release(session))

    def _release(self, session: Session) -> None:
        """Close the environment, unless a call hangs in it: then its thread closes it once the call returns."""
        if self._calls is None:
            close_environment(session.environment)
        elif not session.hung:
            closing = asyncio.ensure_future(self._close_in_thread(self._calls, session.environment))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def _close_in_thread(self, calls: BlockingCalls, environment: Environment) -> None:
        while True:
            try:
                await calls.run(lambda: close_environment(environment))
            except NoThread as error:
                if not self._stopped:
                    await asyncio.sleep(CLOSING_S)
                    continue
                logger.error("environment %s could not be closed: %s", environment.name, error)
            except CallTimeout as error:
                logger.error("environment %s could not be closed: %s", environment.name, error)
            return

    async def _call(self, function: Callable[[], T], afterwards: Callable[[T | None], None], doing: str) -> T:
        if self._calls is not None:
            return await self._calls.run(function, afterwards)
        self.on_loop.begin(doing)
        try:
            return function()
        finally:
            self.on_loop.end()


def _close_late(session: Session | None) -> None:
    if session is not None:
        close_environment(session.environment)
