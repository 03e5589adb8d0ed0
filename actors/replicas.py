"""Several servers of one environment as one client: the load is spread, a dead server's episodes begin again elsewhere.

Invariants
- A session lives on the server that opened it. When that server cannot be reached the session is lost (`SessionLost`),
  so its episode restarts from reset, on another server where there is one.
- A server that failed rests for a while that doubles with each failure in a row; resets go to the others meanwhile.
- `EnvironmentUnavailableError` only when no server can be used.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from env_servers.client import EnvironmentClient, EnvironmentUnavailableError, SessionLost
from env_servers.protocol import EnvInfo, ResetRequest, StepResult

logger = logging.getLogger(__name__)

FIRST_REST_S = 0.5
LONGEST_REST_S = 30.0


@dataclass(slots=True)
class _Replica:
    client: EnvironmentClient
    sessions: int = 0
    failures: int = 0
    rests_until: float = 0.0


class Replicas:
    """An `EnvironmentClient` over the clients of an environment's servers, one or more.

    With several, give each little patience of its own: the others are there.
    """

    def __init__(self, clients: Sequence[EnvironmentClient]) -> None:
        self._replicas = [_Replica(client) for client in clients]
        self._of_session: dict[str, _Replica] = {}

    async def info(self) -> EnvInfo:
        """What the first server says of itself that can be reached."""
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
        """Open a session on the server with the fewest; after a failure on the next, each tried once."""
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
        replica = self._of_session.get(session)
        if replica is None:
            raise SessionLost("the session is closed")
        try:
            return await replica.client.step(session, step, action)
        except EnvironmentUnavailableError as error:
            self._failed(replica, error)
            raise SessionLost(str(error)) from error

    async def close_session(self, session: str) -> None:
        replica = self._of_session.pop(session, None)
        if replica is not None:
            replica.sessions -= 1
            if not self._rests(replica):
                await replica.client.close_session(session)

    async def close(self) -> None:
        for replica in self._replicas:
            await replica.client.close()

    def _by_load(self) -> list[_Replica]:
        """Those that are well, the least loaded first; then those that rest, the one that is up next first."""
        return sorted(
            self._replicas,
            key=lambda replica: (self._rests(replica) and replica.rests_until, replica.sessions),
        )

    def _rests(self, replica: _Replica) -> bool:
        return replica.rests_until > asyncio.get_running_loop().time()

    def _failed(self, replica: _Replica, error: EnvironmentUnavailableError) -> None:
        if self._rests(replica):
            return  # many sessions tell of one failure
        rest_s = min(LONGEST_REST_S, FIRST_REST_S * 2.0 ** min(replica.failures, 16))
        replica.failures += 1
        replica.rests_until = asyncio.get_running_loop().time() + rest_s
        logger.warning("an environment server rests for %.1f s: %s", rest_s, error)
