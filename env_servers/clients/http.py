"""Playing an environment over HTTP.

Invariants
- Every request has a time limit, and all its repeats together have one too (`patience_s`).
- Repeating is safe: a step names its number, so the server takes it once. A repeated reset may leave a session behind
  that nobody uses; it expires.
- A step that is answered with one of `UNACCEPTABLE_STATUSES` is a transition in which the action was refused. It does
  not touch the other steps of its batch.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import Sequence
from typing import TypeVar

import aiohttp
import orjson
from pydantic import BaseModel, ValidationError
from yarl import URL

from env_servers.clients.coalescing import Coalescer
from env_servers.clients.foreign_json import read_json
from env_servers.clients.interface import (
    ActionRefused,
    EnvironmentFailed,
    EnvironmentUnavailableError,
    RequestRejected,
    SessionLost,
    TryAgain,
    WrongAnswer,
    one_line,
    persevere,
)
from env_servers.clients.refusals import Refusals
from env_servers.numbers import fault
from env_servers.protocol import (
    BatchResetRequest,
    BatchResult,
    CloseRequest,
    EnvInfo,
    Problem,
    ResetRequest,
    StepRequest,
    StepResult,
)
from env_servers.validation import summary

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=BaseModel)

RETRIED_STATUSES = frozenset({429, 502, 503, 504})
LOST_STATUSES = frozenset({404, 410})
UNACCEPTABLE_STATUSES = frozenset({400, 413, 422})
"""Of a step: the server does not take its action. Ours says so of one that is too long."""
KEEP_ALIVE_S = 60.0
WRONG_VALUE = 500
"""Status of the problem that stands for an answer with a wrong value: not repeated, and the session is not lost."""


class HttpClient:
    """Client of one environment server.

    Args:
        url: address of the server, `http://host:port`.
        token: its bearer token, where it asks for one.
        timeout_s: time limit of one request, the wait for a free connection included.
        connections: most connections at the same time.
        patience_s: how long a request is repeated while the server is away or busy.
        coalesce: send steps that are asked for at about the same time in one request; none: where the server says that
            it answers quickly.
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
        self._url = URL(url)
        if self._url.scheme not in ("http", "https") or not self._url.host:
            raise ValueError(f"{url!r} is no address of an environment server: write http://host:port")
        encoding = "identity" if _is_loopback(self._url.host) else "gzip"
        self._headers = {"Content-Type": "application/json", "Accept-Encoding": encoding}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        self._timeout_s = timeout_s
        self._connections = connections
        self._patience_s = patience_s
        self._http: aiohttp.ClientSession | None = None
        self._coalescer = Coalescer(self._send_steps) if coalesce else None
        self._asked = coalesce is not None
        self._refusals = Refusals()
        self._longest_action: int | None = None

    async def info(self) -> EnvInfo:
        return self._parse(EnvInfo, await self._request("GET", "info"))

    async def reset(self, request: ResetRequest) -> StepResult:
        """Open a session. A request that had to be repeated may leave an idle one behind, which expires."""
        if not self._asked:
            await self._ask_for_batching()
        first = self._parse_result(await self._request("POST", "reset", _encode(request.model_dump())))
        return self._refusals.opened(request, self._in_place(first, first.session, 0))

    async def step(self, session: str, step: int, action: str) -> StepResult:
        """Take action number `step` (from 1). One that the server refuses gives a result that says so."""
        return await self._refusals.step(session, step, action, self._take)

    async def _take(self, session: str, step: int, action: str) -> StepResult:
        if self._longest_action is not None and len(action) > self._longest_action:
            # The server would refuse the whole batch that the action travels in.
            raise ActionRefused(f"action: {len(action)} characters, at most {self._longest_action} are taken")
        body = _encode_step(session, step, action)
        answer = await (self._step_alone(body) if self._coalescer is None else self._coalescer.step(body))
        if isinstance(answer, Problem) and answer.status in RETRIED_STATUSES:
            answer = await self._step_alone(body)
        if isinstance(answer, StepResult):
            return self._in_place(answer, session, step)
        if answer.status in LOST_STATUSES:
            raise SessionLost(answer.detail)
        if answer.status in UNACCEPTABLE_STATUSES:
            raise ActionRefused(answer.detail)
        raise _rejection(answer.status)(answer.detail)

    async def reset_many(self, requests: Sequence[ResetRequest]) -> list[StepResult | Problem]:
        """Open sessions, at most `MAX_BATCH`. A task that could not be reset gives its problem in its place."""
        body = BatchResetRequest(items=list(requests)).model_dump()
        return self._parse_batch(await self._request("POST", "batch/reset", _encode(body)))

    async def step_many(self, requests: Sequence[StepRequest]) -> list[StepResult | Problem]:
        """Step sessions, at most `MAX_BATCH`. A session that could not be stepped gives its problem in its place."""
        return await self._send_steps([_encode_step(item.session, item.step, item.action) for item in requests])

    async def close_session(self, session: str) -> None:
        """Free a session's slot early. It is tried once: a session that is not closed expires."""
        self._refusals.closed(session)
        body = _encode(CloseRequest(session=session).model_dump())
        try:
            await self._request("POST", "close", body, LOST_STATUSES, patience_s=0.0)
        except SessionLost:
            logger.debug("a session was gone before it was closed")
        except EnvironmentUnavailableError as error:
            logger.info("a session is left to expire: %s", error)

    async def close(self) -> None:
        if self._coalescer is not None:
            await self._coalescer.close()
        if self._http is not None:
            await self._http.close()
            self._http = None

    async def _ask_for_batching(self) -> None:
        info = await self.info()
        self._longest_action = info.max_action_chars
        if info.batching and self._coalescer is None:
            self._coalescer = Coalescer(self._send_steps)
        self._asked = True

    async def _step_alone(self, body: bytes) -> StepResult:
        return self._parse_result(await self._request("POST", "step", body, LOST_STATUSES, UNACCEPTABLE_STATUSES))

    async def _send_steps(self, bodies: Sequence[bytes]) -> list[StepResult | Problem]:
        if len(bodies) == 1:
            return [await self._step_alone(bodies[0])]
        body = b'{"items":[' + b",".join(bodies) + b"]}"
        try:
            answer = await self._request("POST", "batch/step", body, unacceptable=UNACCEPTABLE_STATUSES)
        except (ActionRefused, EnvironmentFailed):  # one of them spoils the batch, and nothing says which
            return [*await asyncio.gather(*map(self._settle, bodies))]
        answers = self._parse_batch(answer)
        if len(answers) != len(bodies):
            raise EnvironmentUnavailableError(f"{self._name} answered {len(answers)} of {len(bodies)} steps")
        return answers

    async def _settle(self, body: bytes) -> StepResult | Problem:
        """One step's result, or the problem that it met, as a batch has it."""
        try:
            return await self._step_alone(body)
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
        unacceptable: frozenset[int] = frozenset(),
        patience_s: float | None = None,
    ) -> bytes:
        async def attempt() -> bytes:
            try:
                status, answer, retry_after = await self._send(method, path, body)
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, TimeoutError) as error:
                raise TryAgain(one_line(str(error)) or f"no answer within {self._timeout_s:g} s") from error
            except aiohttp.ClientError as error:
                raise EnvironmentUnavailableError(
                    f"{self._name} does not speak HTTP: {one_line(str(error))}"
                ) from error
            if status in RETRIED_STATUSES:
                raise TryAgain(f"it answered {status}: {_detail(answer)}", retry_after)
            if status in unacceptable:
                raise ActionRefused(_detail(answer) or f"{self._name} answered {status}")
            return self._accept(status, answer, lost)

        return await persevere(attempt, self._name, self._patience_s if patience_s is None else patience_s)

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
            raise _rejection(status)(_detail(answer) or f"{self._name} answered {status}")
        raise EnvironmentUnavailableError(f"{self._name} answered {status}: it is no environment server")

    def _parse(self, model: type[M], answer: bytes) -> M:
        try:
            return model.model_validate_json(answer)
        except ValidationError as error:
            problem = summary(error)
            raise EnvironmentUnavailableError(f"{self._name} does not speak the step API: {problem}") from error

    def _parse_result(self, answer: bytes) -> StepResult:
        """Raises RequestRejected for JSON that is no right result: the episode fails, the server is not away."""
        try:
            result = self._checked(StepResult.model_validate_json(answer))
        except ValidationError:
            try:
                item = read_json(answer)
            except ValueError:
                return self._parse(StepResult, answer)
            result = self._parse_item(item)
        if isinstance(result, Problem):
            raise _rejection(result.status)(result.detail)
        return result

    def _parse_batch(self, answer: bytes) -> list[StepResult | Problem]:
        """One entry an item; a wrong value is the problem of its own item only."""
        try:
            return [self._checked(item) for item in BatchResult.model_validate_json(answer).items]
        except ValidationError:
            items = _items(answer)
        return self._parse(BatchResult, answer).items if items is None else [self._parse_item(item) for item in items]

    def _parse_item(self, item: object) -> StepResult | Problem:
        try:
            return self._checked(StepResult.model_validate(item))
        except ValidationError as error:
            found = error
        try:
            return Problem.model_validate(item)
        except ValidationError:
            return self._wrong(_wrong_value(found))

    def _in_place(self, result: StepResult, session: str, step: int) -> StepResult:
        """The result, unless it is another step's or session's, whose reward this step would then be given."""
        if result.session != session:
            raise WrongAnswer(f"{self._name} answered step {step} with the state of another session")
        if result.step != step:
            raise WrongAnswer(f"{self._name} answered step {step} as if it were step {result.step}")
        return result

    def _checked(self, result: StepResult | Problem) -> StepResult | Problem:
        problem = None if isinstance(result, Problem) else fault(result.reward, result.facts)
        return result if problem is None else self._wrong(problem)

    def _wrong(self, problem: str) -> Problem:
        return Problem(title="Wrong value", status=WRONG_VALUE, detail=f"{self._name} gave a wrong value: {problem}")

    @property
    def _name(self) -> str:
        return f"the environment server at {self._url.origin()}"


def _rejection(status: int) -> type[RequestRejected]:
    return EnvironmentFailed if status >= 500 else RequestRejected


def _encode(body: dict[str, object]) -> bytes:
    try:
        return orjson.dumps(body)
    except orjson.JSONEncodeError as error:
        raise RequestRejected(f"the request is no JSON: {error}") from error


def _encode_step(session: str, step: int, action: str) -> bytes:
    try:
        return orjson.dumps({"session": session, "step": step, "action": action})
    except orjson.JSONEncodeError as error:
        raise ActionRefused(f"the action is no valid unicode text: {error}") from error


def _detail(answer: bytes) -> str:
    try:
        return Problem.model_validate_json(answer).detail
    except ValidationError:
        return one_line(answer.decode(errors="replace"))


def _wrong_value(error: ValidationError) -> str:
    """What is wrong with an answer, the reward first."""
    found = error.errors()
    rewards = [e["input"] for e in found if e["loc"] == ("reward",) and e["type"] != "missing"]
    return (fault(rewards[0], {}) if rewards else None) or summary(error)


def _items(answer: bytes) -> list[object] | None:
    """The items of a batch's answer as they came; None where it is not one."""
    try:
        items = read_json(answer)["items"]
    except (ValueError, KeyError, TypeError):
        return None
    return items if isinstance(items, list) else None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
