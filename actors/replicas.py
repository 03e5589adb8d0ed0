"""Several servers of one environment as one client: balances the load, restarts a dead server's episodes on others.

Invariants
- A session belongs to the server that opened it. If that server is unreachable, the session is lost (`SessionLost`), so
  its episode restarts from reset, on another server if there is one.
- A server that failed gets no resets for a back-off time that doubles with each failure in a row, unless all servers
  are backing off.
- `EnvironmentUnavailableError` is raised only if no server is usable.
- Of servers with equally many sessions, a random one is next: many actors with few sessions each, of which none knows
  the others', would otherwise all fill the first servers.

Example: two servers with 3 and 5 sessions.

    reset            goes to A (3 sessions, now 4)
    step on A fails  SessionLost; A backs off for 0.5 s, after the next failure for 1 s, ...
    reset            goes to B (5 sessions), although A has fewer
    0.5 s later      resets go to A again; a success ends its failures in a row
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass

from env_servers.client import EnvironmentClient, EnvironmentUnavailableError, SessionLost
from env_servers.protocol import EnvInfo, ResetRequest, StepResult

logger = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 30.0


@dataclass(slots=True)
class _Replica:
    """One server.

    Attributes:
        client: of the server.
        sessions: number of open sessions.
        failures: number of failures in a row.
        backs_off_until: when it gets resets again, on the event loop's clock.
    """

    client: EnvironmentClient
    sessions: int = 0
    failures: int = 0
    backs_off_until: float = 0.0


class Replicas:
    """An `EnvironmentClient` over the clients of an environment's servers.

    Args:
        clients: one or more. Several should have little patience of their own, since the others can take over.
    """

    def __init__(self, clients: Sequence[EnvironmentClient]) -> None:
        self._replicas = [_Replica(client) for client in clients]
        self._of_session: dict[str, _Replica] = {}

    async def info(self) -> EnvInfo:
        """Description by the first server that is reachable. Raises EnvironmentUnavailableError if none is."""
        failure: EnvironmentUnavailableError | None = None
        for replica in self._by_load():
            try:
                return await replica.client.info()
            except EnvironmentUnavailableError as error:
                self._failed(replica, error)
                failure = error
        assert failure is not None
        raise failure

    async def reset(self, request: ResetRequest) -> StepResult:
        """Open a session on the server with the fewest; after a failure on the next one. Each is tried once.

        Raises:
            EnvironmentUnavailableError: no server is usable.
            RequestRejected: from a client.
        """
        failure: EnvironmentUnavailableError | None = None
        for replica in self._by_load():
            replica.sessions += 1
            try:
                state = await replica.client.reset(request)
            except EnvironmentUnavailableError as error:
                self._failed(replica, error)
                failure = error
                replica.sessions -= 1
                continue
            except BaseException:
                replica.sessions -= 1
                raise
            replica.failures = 0
            self._of_session[state.session] = replica
            return state
        assert failure is not None
        raise failure

    async def step(self, session: str, step: int, action: str) -> StepResult:
        """Take action number `step` (from 1).

        Raises:
            SessionLost: the session is gone, or its server is unavailable.
            RequestRejected: from a client.
        """
        replica = self._of_session.get(session)
        if replica is None:
            raise SessionLost("the session is closed")
        try:
            return await replica.client.step(session, step, action)
        except EnvironmentUnavailableError as error:
            self._failed(replica, error)
            raise SessionLost(str(error)) from error

    async def close_session(self, session: str) -> None:
        """Close a session; if its server is backing off, leave it to expire."""
        replica = self._of_session.pop(session, None)
        if replica is not None:
            replica.sessions -= 1
            if not self._backs_off(replica):
                await replica.client.close_session(session)

    async def close(self) -> None:
        """Close all clients."""
        for replica in self._replicas:
            await replica.client.close()

    def _by_load(self) -> list[_Replica]:
        """Usable servers, least loaded first; then those that back off, the one whose back-off ends first."""
        return sorted(
            self._replicas,
            key=lambda replica: (
                self._backs_off(replica) and replica.backs_off_until,
                replica.sessions,
                random.random(),
            ),
        )

    def _backs_off(self, replica: _Replica) -> bool:
        return replica.backs_off_until > asyncio.get_running_loop().time()

    def _failed(self, replica: _Replica, error: EnvironmentUnavailableError) -> None:
        if self._backs_off(replica):
            return  # many sessions report the same failure
        backoff_s = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(replica.failures, 16))
        replica.failures += 1
        replica.backs_off_until = asyncio.get_running_loop().time() + backoff_s
        logger.warning("environment server backs off for %.1f s: %s", backoff_s, error)
