"""What every client of an environment offers, the three errors that its users meet, and how it keeps trying.

Invariants
- Whatever is repeated is repeated for a bounded time, with growing pauses.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from env_servers.protocol import EnvInfo, ResetRequest, StepResult

logger = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_DELAY_S = 0.05
LONGEST_DELAY_S = 5.0
MAX_SHOWN_CHARS = 300


class EnvironmentUnavailableError(Exception):
    """The server cannot be reached, stays busy, or is no environment server, after bounded retries."""


class SessionLost(Exception):
    """The server does not know the session (any more): restart the episode from reset."""


class RequestRejected(Exception):
    """The server refused the request, or failed at it, for good. The message is the problem's detail."""


class EnvironmentFailed(RequestRejected):
    """The environment failed at the request (HTTP 500). A step's session is gone; its action may be the cause."""


class WrongAnswer(RequestRejected):
    """The server took the request, and answered with the state of another step or session."""


class ActionRefused(RequestRejected):
    """The server does not take this action; the session is as it was. The message says what was wrong with it.

    Clients make a transition of it (`refusals.py`): their callers see it only for sessions that they did not open.
    """


class EnvironmentClient(Protocol):
    """What plays episodes. `reset` and `step` raise the three errors above."""

    async def info(self) -> EnvInfo: ...
    async def reset(self, request: ResetRequest) -> StepResult: ...
    async def step(self, session: str, step: int, action: str) -> StepResult: ...
    async def close_session(self, session: str) -> None: ...
    async def close(self) -> None: ...


class TryAgain(Exception):
    """An attempt failed in a way that may pass. `after_s`: how long to wait at least."""

    def __init__(self, trouble: str, after_s: float = 0.0) -> None:
        super().__init__(trouble)
        self.after_s = after_s


async def persevere(attempt: Callable[[], Awaitable[T]], name: str, patience_s: float) -> T:
    """The result of the first attempt that does not raise `TryAgain`; for `patience_s` seconds, then no new one begins.

    Raises:
        EnvironmentUnavailableError: the last attempt's trouble, with `name`.
    """
    loop = asyncio.get_running_loop()
    began = loop.time()
    number = 0
    while True:
        number += 1
        try:
            return await attempt()
        except TryAgain as error:
            delay = max(error.after_s, _back_off(number))
            spent = loop.time() - began
            if spent + delay > patience_s:
                raise EnvironmentUnavailableError(
                    f"{name} cannot be used, after {number} attempts in {spent:.1f} s: {error}"
                ) from error
            logger.log(logging.DEBUG if number == 1 else logging.INFO, "%s: trying again: %s", name, error)
        await asyncio.sleep(delay)


def one_line(text: str) -> str:
    """The beginning of a text that came from elsewhere, as one line."""
    return " ".join(text[:MAX_SHOWN_CHARS].split())


def _back_off(attempt: int) -> float:
    """Seconds to wait after attempt number `attempt` (from 1): exponential, with jitter."""
    return min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(attempt - 1, 16)) * random.uniform(0.5, 1.0)
