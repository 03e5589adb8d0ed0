"""The sessions of a whole server: those of this process and, when it is full, those of the other processes.

For sessions that are bound to a connection, as OpenEnv's are to a WebSocket. HTTP requests are routed by `affinity`.
"""

from __future__ import annotations

import logging

from env_servers.protocol import CloseRequest, EnvInfo, Problem, ResetRequest, StepRequest, StepResult
from env_servers.sessions.ids import worker_of_session
from env_servers.sessions.table import Busy, SessionError, SessionTable, SessionUnknown
from env_servers.workers.link import GONE, NONE_LEFT, Answer, Call, Links, WorkerGone, WorkerSilent

logger = logging.getLogger(__name__)

LOST = "the worker process that holds the session did not answer in time: reset to start another"


class ServerSessions:
    """Opens, steps and closes sessions in any process. Raises what a session table raises.

    Args:
        table: the table of this process.
        links: links to the other processes; none: there is only one process.
        most: session limit of all processes together.

    Attributes:
        info: what the server serves.
    """

    def __init__(self, table: SessionTable, links: Links | None, most: int) -> None:
        self.info: EnvInfo = table.info.model_copy(update={"max_sessions": most})
        self._table = table
        self._links = links

    async def reset(self, request: ResetRequest) -> StepResult:
        """Open a session: in this process, or in the first other one that has room."""
        try:
            return await self._table.reset(request)
        except Busy:
            if self._links is None:
                raise
        return await self._reset_elsewhere(self._links, request)

    async def step(self, request: StepRequest) -> StepResult:
        away = self._away(request.session)
        if away is None:
            return await self._table.step(request)
        answer = await _ask(*away, Call("POST", "/step", body=request.model_dump_json().encode()))
        if answer.status in (404, 410):
            raise SessionUnknown(_detail(answer))
        return _result(answer)

    async def close(self, session: str) -> None:
        """Close a session. One in a process that cannot be reached expires there."""
        away = self._away(session)
        if away is None:
            self._table.close(session)
            return
        try:
            await _ask(*away, Call("POST", "/close", body=CloseRequest(session=session).model_dump_json().encode()))
        except SessionError as error:
            logger.info("closing a session failed; it will expire: %s", error)

    async def _reset_elsewhere(self, links: Links, request: ResetRequest) -> StepResult:
        call = Call("POST", "/reset", body=request.model_dump_json().encode())
        workers = links.workers()
        for worker in [n for n in workers if n > links.worker] + [n for n in workers if n < links.worker]:
            try:
                answer = await _ask(links, worker, call)
            except SessionUnknown:
                continue
            if answer.status != 503:
                return _result(answer)
        raise Busy(NONE_LEFT)

    def _away(self, session: str) -> tuple[Links, int] | None:
        """The other process that holds the session; None if it is this one."""
        worker = worker_of_session(session)
        if self._links is None or worker is None or worker == self._links.worker:
            return None
        return self._links, worker


async def _ask(links: Links, worker: int, call: Call) -> Answer:
    try:
        return await links.call(worker, call)
    except WorkerGone as error:
        raise SessionUnknown(GONE, "failed") from error
    except WorkerSilent as error:  # whether the step was taken is unknown
        raise SessionUnknown(LOST, "failed") from error


def _result(answer: Answer) -> StepResult:
    if answer.status == 503:
        raise Busy(_detail(answer))
    if answer.status != 200:
        raise SessionError(_detail(answer))
    return StepResult.model_validate_json(answer.body)


def _detail(answer: Answer) -> str:
    return Problem.model_validate_json(answer.body).detail
