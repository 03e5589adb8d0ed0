"""Client of sessions in this process, without HTTP: for tests, benchmarks and warm starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pydantic import ValidationError

from env_servers.clients.interface import (
    ActionRefused,
    EnvironmentFailed,
    EnvironmentUnavailableError,
    RequestRejected,
    SessionLost,
)
from env_servers.clients.refusals import Refusals
from env_servers.environment import Environment, TaskError
from env_servers.errors import summary
from env_servers.protocol import EnvInfo, ResetRequest, StepRequest, StepResult
from env_servers.sessions.table import CALL_SECONDS, Busy, EnvironmentFault, SessionError, SessionTable, SessionUnknown


class LocalClient:
    """Plays an environment in this process, with the results and errors of the other clients.

    Args:
        factory: the environment class.
        max_sessions, idle_seconds, threads, call_seconds: as in `ServerSettings`.
    """

    def __init__(
        self,
        factory: type[Environment],
        *,
        max_sessions: int = 4096,
        idle_seconds: float = 600.0,
        threads: int = 8,
        call_seconds: float = CALL_SECONDS,
    ) -> None:
        self._table = SessionTable(
            factory,
            max_sessions=max_sessions,
            idle_seconds=idle_seconds,
            threads=threads,
            call_seconds=call_seconds,
        )
        self._refusals = Refusals()

    async def info(self) -> EnvInfo:
        return self._table.info

    async def reset(self, request: ResetRequest) -> StepResult:
        with _client_errors():
            return self._refusals.opened(request, await self._table.reset(request))

    async def step(self, session: str, step: int, action: str) -> StepResult:
        return await self._refusals.step(session, step, action, self._take)

    async def _take(self, session: str, step: int, action: str) -> StepResult:
        with _client_errors():
            return await self._table.step(StepRequest(session=session, step=step, action=action))

    async def close_session(self, session: str) -> None:
        self._refusals.closed(session)
        with suppress(SessionUnknown):
            self._table.close(session)

    async def close(self) -> None:
        await self._table.shutdown()


@contextmanager
def _client_errors() -> Iterator[None]:
    """Turn the session table's errors into those of a client."""
    try:
        yield
    except SessionUnknown as error:
        raise SessionLost(str(error)) from error
    except Busy as error:
        raise EnvironmentUnavailableError(str(error)) from error
    except ValidationError as error:
        raise ActionRefused(summary(error)) from error
    except EnvironmentFault as error:
        raise EnvironmentFailed(str(error)) from error
    except (SessionError, TaskError) as error:
        raise RequestRejected(str(error)) from error
