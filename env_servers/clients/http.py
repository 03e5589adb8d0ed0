"""Client of an environment server over HTTP (the step API).

Invariants
- Every request has a time limit, and so have all its retries together (`patience_s`).
- Retries are safe: a step carries its number, so the server takes it once. A retried reset may leave an unused session
  behind, which expires.
- A step that is answered with one of `REFUSED_STATUSES` is a transition in which the action was refused.
- One step does not affect the other steps of its batch: where the answer to a batch is an error or cannot be read, each
  step is sent again alone.
- An answer that cannot be right is an error that names the server and the value; nothing is guessed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import TypeVar

import aiohttp
import orjson
from pydantic import BaseModel, ValidationError

from env_servers.clients.bodies import AnswerTooLong, is_loopback, read_body, server_url
from env_servers.clients.coalescing import Answer, Coalescer
from env_servers.clients.foreign_json import read_json
from env_servers.clients.interface import (
    ActionRefused,
    EnvironmentFailed,
    EnvironmentUnavailableError,
    RequestRejected,
    SessionLost,
    WrongAnswer,
)
from env_servers.clients.refusals import Refusals
from env_servers.clients.retry import RetryableError, retry
from env_servers.errors import one_line, summary
from env_servers.protocol import (
    LARGEST_INTEGER,
    BatchResetRequest,
    BatchResult,
    CloseRequest,
    EnvInfo,
    Problem,
    ResetRequest,
    StepRequest,
    StepResult,
    invalid_value,
)

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=BaseModel)

RETRIED_STATUSES = frozenset({429, 502, 503, 504})
LOST_STATUSES = frozenset({404, 410})
REFUSED_STATUSES = frozenset({400, 413, 422})
"""Of a step: the server does not accept its action. Our server returns 422 for an action that is too long."""
KEEP_ALIVE_S = 60.0
WRONG_VALUE = 500
"""Status of the problem that replaces an answer with an invalid value: not retried, and the session is not lost."""


class HttpClient:
    """Client of one environment server.

    Args:
        url: address of the server, `http://host:port`.
        token: bearer token; none: the server requires none.
        timeout_s: time limit of one request, including the wait for a free connection.
        connections: maximum number of connections.
        patience_s: how long a request is retried while the server is unreachable or busy.
        coalesce: send concurrent steps in one request; none: if the server's `/info` says that its steps are fast.

    Raises:
        ValueError: `url` is no address.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout_s: float = 30.0,
        connections: int = 256,
        patience_s: float = 60.0,
        coalesce: bool | None = None,
    ) -> None:
        self._url = server_url(url, "an environment server")
        # On loopback compression costs more than it saves.
        encoding = "identity" if is_loopback(self._url.host or "") else "gzip"
        self._headers = {"Content-Type": "application/json", "Accept-Encoding": encoding}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        self._timeout_s = timeout_s
        self._connections = connections
        self._patience_s = patience_s
        self._http: aiohttp.ClientSession | None = None
        self._coalescer = Coalescer(self._send_steps) if coalesce else None
        self._info_is_read = coalesce is not None
        self._refusals = Refusals()
        self._max_action_chars: int | None = None

    async def info(self) -> EnvInfo:
        """What the server serves.

        Raises:
            EnvironmentUnavailableError: unreachable, or no environment server. RequestRejected: the token is wrong.
        """
        info = self._parse(EnvInfo, await self._request("GET", "info"))
        for split, size in info.splits.items():
            if not 0 <= size < LARGEST_INTEGER:
                raise EnvironmentUnavailableError(
                    f"{self._name} does not speak the step API: splits.{one_line(split)} is not a number of tasks"
                )
        return info

    async def reset(self, request: ResetRequest) -> StepResult:
        """Open a session. A retried request may leave an unused one behind, which expires."""
        if not self._info_is_read:
            await self._read_info()
        first = self._parse_result(await self._request("POST", "reset", _encode(request.model_dump())))
        return self._refusals.opened(request, self._in_place(first, first.session, 0))

    async def step(self, session: str, step: int, action: str) -> StepResult:
        """Take action number `step` (from 1). An action that the server refuses gives a result that says so."""
        return await self._refusals.step(session, step, action, self._take)

    async def _take(self, session: str, step: int, action: str) -> StepResult:
        if self._max_action_chars is not None and len(action) > self._max_action_chars:
            # The server would refuse the whole batch that holds the action.
            raise ActionRefused(f"action: {len(action)} characters, the limit is {self._max_action_chars}")
        body = _encode_step(session, step, action)
        answer = await (self._step_alone(body) if self._coalescer is None else self._coalescer.step(body))
        if isinstance(answer, Problem) and answer.status in RETRIED_STATUSES:
            answer = await self._step_alone(body)
        if isinstance(answer, StepResult):
            return self._in_place(answer, session, step)
        detail = one_line(answer.detail)
        if answer.status in LOST_STATUSES:
            raise SessionLost(detail)
        if answer.status in REFUSED_STATUSES:
            raise ActionRefused(detail)
        raise _rejection(answer.status)(detail)

    async def reset_many(self, requests: Sequence[ResetRequest]) -> list[StepResult | Problem]:
        """Open at most `MAX_BATCH` sessions. A reset that failed gives its problem in its place."""
        body = BatchResetRequest(items=list(requests)).model_dump()
        answers = self._parse_batch(await self._request("POST", "batch/reset", _encode(body)))
        if answers is None:
            raise EnvironmentUnavailableError(f"{self._name} does not speak the step API: invalid answer to a batch")
        return answers

    async def step_many(self, requests: Sequence[StepRequest]) -> list[StepResult | Problem]:
        """Take at most `MAX_BATCH` steps. A step that failed gives its problem in its place."""
        answers = await self._send_steps([_encode_step(item.session, item.step, item.action) for item in requests])
        results = []
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
            results.append(answer)
        return results

    async def close_session(self, session: str) -> None:
        """Close a session early. Not retried: a session that stays open expires."""
        self._refusals.closed(session)
        body = _encode(CloseRequest(session=session).model_dump())
        try:
            await self._request("POST", "close", body, LOST_STATUSES, patience_s=0.0)
        except SessionLost:
            logger.debug("the session was already gone")
        except (EnvironmentUnavailableError, RequestRejected) as error:
            logger.info("closing a session failed; it will expire: %s", error)

    async def close(self) -> None:
        """Close all connections."""
        if self._coalescer is not None:
            await self._coalescer.close()
        if self._http is not None:
            await self._http.close()
            self._http = None

    async def _read_info(self) -> None:
        info = await self.info()
        self._max_action_chars = info.max_action_chars
        if info.batching and self._coalescer is None:
            self._coalescer = Coalescer(self._send_steps)
        self._info_is_read = True

    async def _step_alone(self, body: bytes) -> StepResult:
        return self._parse_result(await self._request("POST", "step", body, LOST_STATUSES, REFUSED_STATUSES))

    async def _send_steps(self, bodies: Sequence[bytes]) -> list[Answer]:
        if len(bodies) == 1:
            return [await self._step_alone(bodies[0])]
        body = b'{"items":[' + b",".join(bodies) + b"]}"
        try:
            answers = self._parse_batch(await self._request("POST", "batch/step", body, give_up_early=True))
        except RequestRejected as error:
            logger.debug("a batch of %d steps failed: %s", len(bodies), error)
            answers = None
        if answers is None or len(answers) != len(bodies):
            # One step spoils the batch, and nothing says which. A step that was taken is answered again.
            return [*await asyncio.gather(*map(self._settle, bodies))]
        return [*answers]

    async def _settle(self, body: bytes) -> Answer:
        """One step's result, or its problem, as a batch has it."""
        try:
            return await self._step_alone(body)
        except EnvironmentUnavailableError as error:
            return error
        except SessionLost as error:
            return Problem(title="Gone", status=410, detail=str(error))
        except ActionRefused as error:
            return Problem(title="Unprocessable", status=422, detail=str(error))
        except EnvironmentFailed as error:
            return Problem(title="Internal Server Error", status=500, detail=str(error))
        except RequestRejected as error:
            return Problem(title="Conflict", status=409, detail=str(error))

    async def _request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        lost: frozenset[int] = frozenset(),
        refused: frozenset[int] = frozenset(),
        patience_s: float | None = None,
        give_up_early: bool = False,
    ) -> bytes:
        """The body of a 2xx answer.

        Args:
            method, path, body: the request.
            lost: statuses that mean `SessionLost`.
            refused: statuses that mean `ActionRefused`.
            patience_s: how long to retry; none: as long as the client does.
            give_up_early: an answer that does not come whole and in time, or is a redirect, is `RequestRejected`
                at once. Otherwise such requests are retried, and end in `EnvironmentUnavailableError`.
        """

        async def attempt() -> bytes:
            try:
                status, answer, retry_after = await self._send(method, path, body)
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, TimeoutError) as error:
                reason = one_line(error) or f"no answer within {self._timeout_s:g} s"
                if give_up_early and isinstance(error, (aiohttp.ClientPayloadError, TimeoutError)):
                    raise RequestRejected(reason) from error
                raise RetryableError(reason) from error
            except AnswerTooLong as error:
                raise EnvironmentFailed(f"{self._name}, {path}: {error}") from error
            except aiohttp.ClientError as error:
                raise EnvironmentUnavailableError(f"{self._name} does not speak HTTP: {one_line(error)}") from error
            if status in RETRIED_STATUSES:
                raise RetryableError(f"status {status}: {_detail(answer)}", retry_after)
            if 200 <= status < 300:
                return answer
            if status < 400 and not give_up_early:
                raise EnvironmentUnavailableError(
                    f"{self._name} is no environment server: status {status} for {method} /{path}"
                )
            detail = _detail(answer) or f"{self._name}: status {status} for {method} /{path}"
            if status in lost:
                raise SessionLost(detail)
            raise ActionRefused(detail) if status in refused else _rejection(status)(detail)

        return await retry(attempt, self._name, self._patience_s if patience_s is None else patience_s)

    async def _send(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes, float]:
        """Status, body, and the seconds of Retry-After."""
        if self._http is None:
            self._http = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self._connections, keepalive_timeout=KEEP_ALIVE_S),
                timeout=aiohttp.ClientTimeout(total=self._timeout_s),
                headers=self._headers,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        async with self._http.request(method, self._url / path, data=body, allow_redirects=False) as response:
            answer = await read_body(response)
            after = response.headers.get("Retry-After", "")
            return response.status, answer, float(after) if after.isdecimal() else 0.0

    def _parse(self, model: type[M], answer: bytes) -> M:
        try:
            return model.model_validate_json(answer)
        except ValidationError as error:
            raise EnvironmentUnavailableError(f"{self._name} does not speak the step API: {summary(error)}") from error

    def _parse_result(self, answer: bytes) -> StepResult:
        """Raises EnvironmentFailed unless it is a valid result: the action failed, the server is not unavailable."""
        try:
            result = self._checked(StepResult.model_validate_json(answer, strict=True))
        except ValidationError as error:
            try:
                item = read_json(answer)
            except ValueError:
                raise EnvironmentFailed(f"{self._name} does not speak the step API: {summary(error)}") from error
            result = self._parse_item(item)
        if isinstance(result, Problem):
            raise _rejection(result.status)(one_line(result.detail))
        return result

    def _parse_batch(self, answer: bytes) -> list[StepResult | Problem] | None:
        """One entry an item; an invalid value is the problem of its own item. None: it is no answer to a batch."""
        try:
            return [self._checked(item) for item in BatchResult.model_validate_json(answer, strict=True).items]
        except ValidationError:
            items = _items(answer)
        return None if items is None else [self._parse_item(item) for item in items]

    def _parse_item(self, item: object) -> StepResult | Problem:
        try:
            return self._checked(StepResult.model_validate(item, strict=True))
        except ValidationError as error:
            found = error
        try:
            return Problem.model_validate(item)
        except ValidationError:
            return self._wrong(_wrong_value(found))

    def _in_place(self, result: StepResult, session: str, step: int) -> StepResult:
        """The result itself, unless it belongs to another step or session, whose reward this step would then get."""
        if result.session != session:
            raise WrongAnswer(f"{self._name} returned the state of another session for step {step}")
        if result.step != step:
            raise WrongAnswer(f"{self._name} returned step {result.step} for step {step}")
        return result

    def _checked(self, result: StepResult | Problem) -> StepResult | Problem:
        reason = None if isinstance(result, Problem) else invalid_value(result.reward, result.facts)
        return result if reason is None else self._wrong(reason)

    def _wrong(self, reason: str) -> Problem:
        return Problem(title="Wrong value", status=WRONG_VALUE, detail=f"{self._name}: invalid value: {reason}")

    @property
    def _name(self) -> str:
        return f"environment server {self._url.origin()}"


def _rejection(status: int) -> type[RequestRejected]:
    """The error of a request that got `status`."""
    return EnvironmentFailed if status >= 500 else RequestRejected


def _encode(body: dict[str, object]) -> bytes:
    try:
        return orjson.dumps(body)
    except orjson.JSONEncodeError as error:
        raise RequestRejected(f"the request cannot be written as JSON: {error}") from error


def _encode_step(session: str, step: int, action: str) -> bytes:
    try:
        return orjson.dumps({"session": session, "step": step, "action": action})
    except orjson.JSONEncodeError as error:
        raise ActionRefused(f"invalid Unicode in the action: {error}") from error


def _detail(answer: bytes) -> str:
    """What an error response says, as one line."""
    try:
        return one_line(Problem.model_validate_json(answer).detail)
    except ValidationError:
        return one_line(answer[:4096].decode(errors="replace"))


def _wrong_value(error: ValidationError) -> str:
    """What is wrong with a result, the reward first."""
    found = error.errors()
    rewards = [e["input"] for e in found if e["loc"] == ("reward",) and e["type"] != "missing"]
    return (invalid_value(rewards[0], {}) if rewards else None) or summary(error)


def _items(answer: bytes) -> list[object] | None:
    """The items of an answer to a batch, unchecked; None: it has none."""
    try:
        items = read_json(answer)["items"]
    except (ValueError, KeyError, TypeError):
        return None
    return items if isinstance(items, list) else None
