"""Retries with exponential back-off and jitter, for a bounded time."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from env_servers.clients.interface import EnvironmentUnavailableError

logger = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_DELAY_S = 0.05
LONGEST_DELAY_S = 5.0


class RetryableError(Exception):
    """An attempt failed in a way that may pass.

    Attributes:
        after_s: minimum delay before the next attempt, in seconds.
    """

    def __init__(self, reason: str, after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.after_s = after_s


async def retry(attempt: Callable[[], Awaitable[T]], name: str, patience_s: float) -> T:
    """Call `attempt` until it raises no `RetryableError`, and return its result.

    Args:
        attempt: makes one attempt. Its other errors are passed on.
        name: what is attempted with, for the messages.
        patience_s: no new attempt begins after this many seconds.

    Raises:
        EnvironmentUnavailableError: `patience_s` is spent. The message holds `name` and the last attempt's error.
    """
    loop = asyncio.get_running_loop()
    started = loop.time()
    number = 0
    while True:
        number += 1
        try:
            return await attempt()
        except RetryableError as error:
            delay = max(error.after_s, _back_off(number))
            spent = loop.time() - started
            if spent + delay > patience_s:
                raise EnvironmentUnavailableError(
                    f"{name} is unavailable ({number} attempts in {spent:.1f} s): {error}"
                ) from error
            logger.log(logging.DEBUG if number == 1 else logging.INFO, "%s: retrying: %s", name, error)
        await asyncio.sleep(delay)


def _back_off(attempt: int) -> float:
    """Delay in seconds after attempt number `attempt` (from 1).

    Example: attempts 1, 2, 3, … 8 give at most 0.05, 0.1, 0.2, … 5 s, and at least half of that.
    """
    return min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(attempt - 1, 16)) * random.uniform(0.5, 1.0)
