"""How long to wait before a retry (`Backoff`), and before the next look at something that has not changed (`Patience`).

It computes delays and leaves waiting and catching to the caller, so that threads (`time.sleep`) and event loops
(`asyncio.sleep`) share it. A library for retries (tenacity) would be a dependency for this one formula: which errors
are retried, and what they become at the end, is each caller's own. `env_servers` may import nothing of ours and has its
own (`env_servers/clients`).
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

_MOST_DOUBLINGS = 64
SHARE = 0.05
"""See `Patience`."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """Delays that double from `first_s` up to `longest_s` seconds.

    Attributes:
        first_s: delay after the first failure, in seconds.
        longest_s: no delay is longer.
        jitter: multiply each delay by a random number between 0.5 and 1, so that many clients of a server that was
            restarted do not come back at the same instant.

    Example:
        Backoff(0.5, 3.0): 0.5, 1.0, 2.0, 3.0, 3.0, …
    """

    first_s: float
    longest_s: float
    jitter: bool = False

    def delay(self, failures: int) -> float:
        """Seconds to wait after so many failures in a row (from 1)."""
        delay = min(self.longest_s, self.first_s * 2.0 ** min(failures - 1, _MOST_DOUBLINGS))
        return delay * random.uniform(0.5, 1.0) if self.jitter else delay

    def within(self, limit_s: float) -> Attempts:
        """The delays of one operation that is repeated for at most `limit_s` seconds from now."""
        return Attempts(self, time.monotonic() + limit_s)


@dataclass(frozen=True, slots=True)
class Patience:
    """Delays between looks at something that changes at a time unknown: each is a `SHARE` of the wait so far.

    So whoever waits long asks seldom, and nobody learns of a change later than by that share of the wait: a thousand
    processes that wait for minutes ask a server as often as a hundred that wait for seconds.

    Attributes:
        shortest_s: no delay is shorter, in seconds.
        longest_s: no delay is longer.

    Example:
        Patience(0.2, 2.0): 0.2 s in the first 4 s of the wait, 0.5 s after 10 s of it, 2 s from the 40th second on
    """

    shortest_s: float
    longest_s: float

    def delay(self, waited_s: float) -> float:
        """Seconds to the next look, after so many seconds of waiting."""
        return max(self.shortest_s, min(self.longest_s, SHARE * waited_s))


class Attempts:
    """Counts the failed attempts at one operation until a deadline."""

    def __init__(self, backoff: Backoff, deadline: float) -> None:
        self._backoff = backoff
        self._deadline = deadline
        self.failures = 0

    def next_delay(self) -> float | None:
        """Seconds to wait after another failure, cut at the deadline; None when the deadline has passed.

        So the last attempt takes place at the deadline.
        """
        self.failures += 1
        left = self._deadline - time.monotonic()
        return min(left, self._backoff.delay(self.failures)) if left > 0 else None
