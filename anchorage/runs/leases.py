"""Returns the tickets of dead actors to the queue: one process a run does it, however many actors there are.

The learner does it as well while it waits for groups, but not during an update, which may take minutes.

Invariants
- A check ends within a few seconds whatever Redis does: the thread that runs it also restarts Redis.
"""

from __future__ import annotations

import contextlib
import logging

from services.buffer import Buffer
from services.buffer.owner import Owner
from services.config.tree import BufferConfig, Config
from services.errors import RedisUnavailable, RunTaken

QUICK = BufferConfig(timeout_s=2.0, reconnect_s=0.1)

log = logging.getLogger(__name__)


class LeaseKeeper:
    """Expires leases on a connection of its own. For one thread, that of the run's supervisor.

    Args:
        config: of the run.
        redis_url: of its Redis.
        owner: the run's hold on its name.

    Attributes:
        expired: number of leases that have expired so far.
    """

    def __init__(self, config: Config, redis_url: str, owner: Owner) -> None:
        self._config = config
        self._redis_url = redis_url
        self._owner = owner
        self._buffer: Buffer | None = None
        self.expired = 0

    def check(self) -> None:
        """Return tickets whose lease has expired. Leaves errors to the run's own calls, which report them."""
        try:
            if self._buffer is None:
                self._buffer = self._connect()
            expired = self._buffer.expire()
        except (RedisUnavailable, RunTaken) as error:
            log.debug("leases not checked: %s", error)
        else:
            self.expired += expired
            if expired:
                log.warning("%d leases of rollout actors expired", expired)

    def close(self) -> None:
        """Close the connection."""
        if self._buffer is not None:
            with contextlib.suppress(OSError):
                self._buffer.close()

    def _connect(self) -> Buffer:
        rollout = self._config.rollout
        return Buffer.connect(
            self._redis_url,
            self._config.run.name,
            QUICK,
            max_attempts=rollout.max_attempts,
            fewest_members=rollout.fewest_members,
            owner=self._owner,
        )
