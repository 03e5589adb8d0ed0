"""Playing an environment: over HTTP, or in this process. Both give the same answers and the same errors.

Invariants
- Every request has a time limit, and all its repeats together have one too (`patience_s`).
- Repeating is safe: a step names its number, so the server takes it once. A repeated reset may leave a session behind
  that nobody uses; it expires.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol, TypeVar

import aiohttp
import orjson
from pydantic import BaseModel, ValidationError
from yarl import URL

from env_servers.environment import Environment, TaskError
from env_servers.protocol import (
    BatchResetRequest,
    BatchResult,
    BatchStepRequest,
    CloseRequest,
    EnvInfo,
    Problem,
    ResetRequest,
    StepRequest,
    StepResult,
)
from env_servers.sessions import Busy, SessionError, SessionTable, SessionUnknown
from env_servers.validation import summary

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=BaseModel)

RETRIED_STATUSES = frozenset({429, 502, 503, 504})
LOST_STATUSES = frozenset({404, 410})
FIRST_DELAY_S = 0.05
LONGEST_DELAY_S = 5.0
KEEP_ALIVE_S = 60.0
MAX_SHOWN_CHARS = 300


class EnvironmentUnavailableError(Exception):
    """The server cannot be reached, stays busy, or is no environment server, after bounded retries."""


class SessionLost(Exception):
    """The server does not know the session (any more): restart the episode from reset."""


class RequestRejected(Exception):
    """The server refused the request, or failed at it, for good. The message is the problem's detail."""


class EnvironmentClient(Protocol):
    """What plays episodes. `reset` and `step` raise the three errors above."""

    async def info(self) -> EnvInfo: ...
    async def reset(self, request: ResetRequest) -> StepResult: ...
    async def step(self, session: str, step: int, action: str) -> StepResult: ...
    async def close_session(self, session: str) -> None: ...
    async def close(self) -> None: ...


class HttpClient:
    """Client of one environment server.

    Args:
        url: address of the server, `http://host:port`.
        token: its bearer token, where it asks for one.
        timeout_s: time limit of one request, the wait for a free connection included.
        connections: most connections at the same time.
        patience_s: how long a request is repeated while the server is away or busy.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout_s: float = 30.0,
        connections: int = 256,
        patience_s: float = 60.0,
    ) -> None:
        self._url = URL(url)
        if self._url.scheme not in ("http", "https") or not self._url.host:
            raise ValueError(f"{url!r} is no address of an environment server: write http://host:port")
        self._headers = {"Content-Type": "application/json"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        self._timeout_s = timeout_s
        self._connections = connections
        self._patience_s = patience_s
        self._http: aiohttp.ClientSession | None = None

    async def info(self) -> EnvInfo:
        return self._parse(EnvInfo, await self._request("GET", "info"))

    async def reset(self, request: ResetRequest) -> StepResult:
        """Open a session. A request that had to be repeated may leave an idle one behind, which expires."""
        return self._parse(StepResult, await self._request("POST", "reset", _encode(request.model_dump())))

    async def step(self, session: str, step: int, action: str) -> StepResult:
        """Take action number `step` (from 1)."""
        body = _encode({"session": session, "step": step, "action": action})
        return self._parse(StepResult, await self._request("POST", "step", body, LOST_STATUSES))

    async def reset_many(self, requests: Sequence[ResetRequest]) -> list[StepResult | Problem]:
        """Open sessions, at most `MAX_BATCH`. A task that could not be reset gives its problem in its place."""
        body = BatchResetRequest(items=list(requests)).model_dump()
        return self._parse(BatchResult, await self._request("POST", "batch/reset", _encode(body))).items

    async def step_many(self, requests: Sequence[StepRequest]) -> list[StepResult | Problem]:
        """Step sessions, at most `MAX_BATCH`. A session that could not be stepped gives its problem in its place."""
        body = BatchStepRequest(items=list(requests)).model_dump()
        return self._parse(BatchResult, await self._request("POST", "batch/step", _encode(body))).items

    async def close_session(self, session: str) -> None:
        """Free a session's slot early. It is tried once: a session that is not closed expires."""
        body = _encode(CloseRequest(session=session).model_dump())
        try:
            await self._request("POST", "close", body, LOST_STATUSES, patience_s=0.0)
        except SessionLost:
            logger.debug("a session was gone before it was closed")
        except EnvironmentUnavailableError as error:
            logger.info("a session is left to expire: %s", error)

    async def close(self) -> None:
        if self._http is not None:
            await self._http.close()
            self._http = None

    async def _request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        lost: frozenset[int] = frozenset(),
        patience_s: float | None = None,
    ) -> bytes:
        loop = asyncio.get_running_loop()
        began = loop.time()
        deadline = began + (self._patience_s if patience_s is None else patience_s)
        attempt = 0
        while True:
            attempt += 1
            retry_after = 0.0
            try:
                status, answer, retry_after = await self._send(method, path, body)
                if status not in RETRIED_STATUSES:
                    return self._accept(status, answer, lost)
                trouble = f"it answered {status}: {_detail(answer)}"
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, TimeoutError) as error:
                trouble = str(error) or f"no answer within {self._timeout_s:g} s"
            except aiohttp.ClientError as error:
                raise EnvironmentUnavailableError(
                    f"{self._name} does not speak HTTP: {_one_line(str(error))}"
                ) from error
            delay = max(retry_after, _delay(attempt))
            if loop.time() + delay > deadline:
                raise EnvironmentUnavailableError(
                    f"{self._name} cannot be used, after {attempt} attempts in {loop.time() - began:.1f} s: {trouble}"
                )
            logger.log(logging.DEBUG if attempt == 1 else logging.INFO, "%s: trying again: %s", self._name, trouble)
            await asyncio.sleep(delay)

    async def _send(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes, float]:
        if self._http is None:
            self._http = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self._connections, keepalive_timeout=KEEP_ALIVE_S),
                timeout=aiohttp.ClientTimeout(total=self._timeout_s),
                headers=self._headers,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        async with self._http.request(method, self._url / path, data=body, allow_redirects=False) as response:
            answer = await response.read()
            after = response.headers.get("Retry-After", "")
            return response.status, answer, float(after) if after.isdecimal() else 0.0

    def _accept(self, status: int, answer: bytes, lost: frozenset[int]) -> bytes:
        if 200 <= status < 300:
            return answer
        if status in lost:
            raise SessionLost(_detail(answer))
        if status >= 400:
            raise RequestRejected(_detail(answer) or f"{self._name} answered {status}")
        raise EnvironmentUnavailableError(f"{self._name} answered {status}: it is no environment server")

    def _parse(self, model: type[M], answer: bytes) -> M:
        try:
            return model.model_validate_json(answer)
        except ValidationError as error:
            problem = summary(error)
            raise EnvironmentUnavailableError(f"{self._name} does not speak the step API: {problem}") from error

    @property
    def _name(self) -> str:
        return f"the environment server at {self._url.origin()}"


class LocalClient:
    """The same sessions in this process, without HTTP: for tests, benchmarks and warm starts.

    Args:
        factory: the environment class.
        max_sessions, idle_seconds, threads: as for a server.
    """

    def __init__(
        self,
        factory: type[Environment],
        *,
        max_sessions: int = 4096,
        idle_seconds: float = 600.0,
        threads: int = 8,
    ) -> None:
        self._table = SessionTable(factory, max_sessions=max_sessions, idle_seconds=idle_seconds, threads=threads)

    async def info(self) -> EnvInfo:
        return self._table.info

    async def reset(self, request: ResetRequest) -> StepResult:
        with _translated():
            return await self._table.reset(request)

    async def step(self, session: str, step: int, action: str) -> StepResult:
        with _translated():
            return await self._table.step(StepRequest(session=session, step=step, action=action))

    async def close_session(self, session: str) -> None:
        with suppress(SessionUnknown):
            self._table.close(session)

    async def close(self) -> None:
        self._table.shutdown()


@contextmanager
def _translated() -> Iterator[None]:
    """The session table's errors as the ones a client raises."""
    try:
        yield
    except SessionUnknown as error:
        raise SessionLost(str(error)) from error
    except Busy as error:
        raise EnvironmentUnavailableError(str(error)) from error
    except ValidationError as error:
        raise RequestRejected(summary(error)) from error
    except (SessionError, TaskError) as error:
        raise RequestRejected(str(error)) from error


def _encode(body: dict[str, object]) -> bytes:
    try:
        return orjson.dumps(body)
    except orjson.JSONEncodeError as error:
        raise RequestRejected(f"the request is no JSON: {error}") from error


def _detail(answer: bytes) -> str:
    try:
        return Problem.model_validate_json(answer).detail
    except ValidationError:
        return _one_line(answer.decode(errors="replace"))


def _one_line(text: str) -> str:
    return " ".join(text[:MAX_SHOWN_CHARS].split())


def _delay(attempt: int) -> float:
    """Exponential back-off with jitter, seconds."""
    return min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(attempt - 1, 16)) * random.uniform(0.5, 1.0)
