"""Client of any OpenEnv server: each session is a WebSocket of its own.

Invariants
- The same results and errors as the other clients.
- OpenEnv has no task indices: task `index` is the seed `index`, and `test` has other seeds than `train`.
- OpenEnv has no repeats: a step whose answer was lost loses the session. The client itself repeats the last result.
- `done` is a termination, unless the observation says `truncated` or the session's own step limit is reached.
- A malformed call, by our check or by the server's, is a transition in which the action was refused. An environment
  that fails at `FAILURES_IN_A_ROW` consecutive steps of a session is considered broken, and the request is rejected,
  unless other sessions took steps meanwhile: then the actions are the cause, and a policy may choose many such.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp
import orjson
from pydantic import ValidationError

from env_servers.clients.bodies import AnswerTooLong, read_body, server_url
from env_servers.clients.interface import (
    ActionRefused,
    EnvironmentUnavailableError,
    RequestRejected,
    SessionLost,
)
from env_servers.clients.openenv_mapping import ActionMapping, Tool, failure_of, introduce, observe
from env_servers.clients.openenv_socket import ServerRefusal, Socket, SocketLost
from env_servers.clients.refusals import Refusals
from env_servers.clients.retry import RetryableError, retry
from env_servers.environment import Observation
from env_servers.errors import one_line
from env_servers.openenv.wire import ErrorCode
from env_servers.protocol import EnvInfo, ResetRequest, StepResult

logger = logging.getLogger(__name__)

FAILURES_IN_A_ROW = 4
REFUSALS = frozenset({ErrorCode.VALIDATION_ERROR, ErrorCode.INVALID_JSON, ErrorCode.UNKNOWN_TYPE})
"""Error codes that concern the message, and so the action in it."""
SEEDS = 1_000_000
FIRST_SEEDS = {"train": 0, "test": SEEDS}


@dataclass
class OpenSession:
    """One socket and the state of its episode.

    Attributes:
        socket: the connection.
        request: the reset that opened the session.
        tools: the server's tools; empty where it has none.
        last: the result of the last step.
        failures: consecutive steps at which the environment failed.
        taken: the client's `_taken` before those failures.
        lock: held while a step is taken.
    """

    socket: Socket
    request: ResetRequest
    tools: list[Tool]
    last: StepResult
    failures: int = 0
    taken: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class OpenEnvClient:
    """Client of one OpenEnv server.

    Args:
        url: address of the server, `http://host:port`, with a path if it has one.
        token: bearer token; none: the server requires none.
        timeout_s: time limit of one answer.
        connections: maximum number of sessions.
        patience_s: how long a reset is retried while the server is unreachable or full.
        action_field: field of an action that takes the text; none: what the server's schema suggests.
        observation_field: field of an observation that holds the text; none: what its fields suggest.

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
        action_field: str | None = None,
        observation_field: str | None = None,
    ) -> None:
        self._url = server_url(url, "an OpenEnv server")
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._timeout_s = timeout_s
        self._connections = connections
        self._patience_s = patience_s
        self._action_field = action_field
        self._observation_field = observation_field
        self._http: aiohttp.ClientSession | None = None
        self._mapping: ActionMapping | None = None
        self._sessions: dict[str, OpenSession] = {}
        self._refusals = Refusals()
        self._taken = 0
        """Steps of all sessions at which the environment did not fail."""

    async def info(self) -> EnvInfo:
        """What the server serves. Its session limit and idle limit are not known."""
        metadata = await self._document("metadata")
        return EnvInfo(
            name=one_line(metadata.get("name") or ""),
            version=one_line(metadata.get("version") or ""),
            splits=dict.fromkeys(FIRST_SEEDS, SEEDS),
            max_sessions=self._connections,
            idle_seconds=0.0,
            anchors=["observation"],
            engine="openenv",
        )

    async def reset(self, request: ResetRequest) -> StepResult:
        """Open a socket and start an episode with the task's seed."""
        seed = _seed_of(request)
        mapping = await self._action_mapping()
        socket, data = await self._start(seed)
        try:
            tools = await self._ask_for_tools(socket) if mapping.calls_tools else []
            seen = self._observe(data)
        except BaseException as error:
            await socket.close()
            if isinstance(error, (SocketLost, ServerRefusal)):
                raise EnvironmentUnavailableError(f"{self._name} does not list its tools: {error}") from error
            raise
        if tools:
            seen = replace(seen, text=f"{seen.text}\n{introduce(tools)}".strip())
        result = _result(secrets.token_urlsafe(16), 0, replace(seen, reward=0.0), request.max_steps)
        self._sessions[result.session] = OpenSession(socket, request, tools, result, taken=self._taken)
        return self._refusals.opened(request, result)

    async def example_actions(self, count: int, seed: int = 0) -> list[str]:
        """Valid actions, drawn from the schemas of the server's tools or actions; empty where any text is an action."""
        mapping = await self._action_mapping()
        if not mapping.calls_tools:
            return mapping.examples((), count, seed)
        first = await self.reset(ResetRequest(split="train", index=0))
        try:
            return mapping.examples(self._sessions[first.session].tools, count, seed)
        finally:
            await self.close_session(first.session)

    async def step(self, session: str, step: int, action: str) -> StepResult:
        """Take action number `step` (from 1). An invalid answer ends the session."""
        return await self._refusals.step(session, step, action, self._take_step)

    async def _take_step(self, session: str, step: int, action: str) -> StepResult:
        open_session = self._sessions.get(session)
        if open_session is None:
            raise SessionLost("no such session: reset to start one")
        async with open_session.lock:
            last = open_session.last
            if step == last.step:
                return last
            if step != last.step + 1:
                raise RequestRejected(f"step {step} is out of order: the session's next step is {last.step + 1}")
            if last.done:
                raise RequestRejected(f"the episode ended with step {last.step}: reset to start another")
            mapping = await self._action_mapping()
            data = await self._take(session, open_session, mapping.action(action, open_session.tools))
            try:
                seen = self._observe(data)
            except RequestRejected:
                await self.close_session(session)
                raise
            open_session.last = _result(session, step, seen, open_session.request.max_steps)
            return open_session.last

    async def close_session(self, session: str) -> None:
        self._refusals.closed(session)
        open_session = self._sessions.pop(session, None)
        if open_session is not None:
            await open_session.socket.close()

    async def close(self) -> None:
        for session in list(self._sessions):
            await self.close_session(session)
        if self._http is not None:
            await self._http.close()
            self._http = None

    def _observe(self, data: dict[str, Any]) -> Observation:
        try:
            return observe(data, self._observation_field)
        except RequestRejected as error:
            raise RequestRejected(f"{self._name}: {error}") from error

    async def _take(self, session: str, open_session: OpenSession, action: dict[str, Any]) -> dict[str, Any]:
        try:
            data = await open_session.socket.ask("step", action)
        except SocketLost as error:
            await self.close_session(session)
            raise SessionLost(f"the session's socket is lost: {error}") from error
        except ServerRefusal as error:
            raise self._refusal(open_session, error) from error
        except TypeError as error:
            raise ActionRefused(f"the action cannot be written as JSON: {error}") from error
        if failure := failure_of(data):
            raise self._refusal(open_session, ServerRefusal(ErrorCode.VALIDATION_ERROR, failure))
        self._taken += 1
        open_session.failures, open_session.taken = 0, self._taken
        return data

    def _refusal(self, open_session: OpenSession, error: ServerRefusal) -> RequestRejected:
        """The error to raise. An exception of the environment may be its way to refuse a bad action."""
        message = one_line(error)
        if error.code in REFUSALS:
            return ActionRefused(message)
        open_session.failures += 1
        broken = open_session.failures >= FAILURES_IN_A_ROW and open_session.taken == self._taken
        if error.code != ErrorCode.EXECUTION_ERROR or broken:
            return RequestRejected(f"{self._name} failed at {open_session.failures} consecutive steps: {message}")
        return ActionRefused(message)

    async def _start(self, seed: int) -> tuple[Socket, dict[str, Any]]:
        """A socket and its first observation; retried while the server is unreachable or full."""

        async def attempt() -> tuple[Socket, dict[str, Any]]:
            try:
                socket = await Socket.connect(self._session(), self._socket_url, self._headers, self._timeout_s)
            except SocketLost as error:
                raise RetryableError(one_line(error)) from error
            try:
                return socket, await socket.ask("reset", {"seed": seed})
            except BaseException as error:
                await socket.close()
                if isinstance(error, SocketLost) or _is_full(error):
                    raise RetryableError(one_line(error)) from error
                if isinstance(error, ServerRefusal):
                    raise RequestRejected(one_line(error)) from error
                raise

        return await retry(attempt, self._name, self._patience_s)

    async def _ask_for_tools(self, socket: Socket) -> list[Tool]:
        data = await socket.ask("step", {"type": "list_tools"})
        try:
            return [Tool.model_validate(tool) for tool in data["observation"]["tools"]]
        except (KeyError, TypeError, ValidationError) as error:
            raise SocketLost("invalid list of tools") from error

    async def _action_mapping(self) -> ActionMapping:
        if self._mapping is None:
            schemas = await self._document("schema")
            schema = schemas.get("action")
            self._mapping = ActionMapping(schema if isinstance(schema, dict) else {}, self._action_field)
        return self._mapping

    async def _document(self, path: str) -> dict[str, Any]:
        """A JSON document of the server; retried while it is unreachable."""

        async def attempt() -> tuple[int, bytes]:
            try:
                async with self._session().get(
                    self._url / path, headers=self._headers, timeout=aiohttp.ClientTimeout(self._timeout_s)
                ) as response:
                    return response.status, await read_body(response)
            except AnswerTooLong as error:
                raise EnvironmentUnavailableError(f"{self._name}, /{path}: {error}") from error
            except (aiohttp.ClientError, TimeoutError) as error:
                raise RetryableError(one_line(error) or f"no answer within {self._timeout_s:g} s") from error

        status, body = await retry(attempt, self._name, self._patience_s)
        if status in (401, 403):
            raise RequestRejected(f"{self._name}: missing or invalid bearer token (status {status} for /{path})")
        try:
            document = orjson.loads(body)
        except orjson.JSONDecodeError:
            document = None
        if status != 200 or not isinstance(document, dict):
            raise EnvironmentUnavailableError(
                f"{self._name} is no OpenEnv server: status {status} for GET /{path}, and no JSON object"
                if status == 200
                else f"{self._name} is no OpenEnv server: status {status} for GET /{path}"
            )
        return document

    def _session(self) -> aiohttp.ClientSession:
        if self._http is None:
            # Every socket is a connection; one more is for the documents.
            connector = aiohttp.TCPConnector(limit=self._connections + 1)
            self._http = aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())
        return self._http

    @property
    def _socket_url(self) -> str:
        return str(self._url.with_scheme("wss" if self._url.scheme == "https" else "ws") / "ws")

    @property
    def _name(self) -> str:
        return f"OpenEnv server {self._url.origin()}"


def _is_full(error: BaseException) -> bool:
    return isinstance(error, ServerRefusal) and error.code == ErrorCode.CAPACITY_REACHED


def _seed_of(request: ResetRequest) -> int:
    first = FIRST_SEEDS.get(request.split)
    if first is None or request.index >= SEEDS:
        raise RequestRejected(f"no task {request.split}/{request.index}: train and test have {SEEDS:,} seeds each")
    if request.anchor == "state":
        raise RequestRejected("OpenEnv servers have no state digest: use anchor 'observation'")
    if request.expert:
        raise RequestRejected("OpenEnv servers have no scripted expert")
    return first + request.index


def _result(session: str, step: int, seen: Observation, max_steps: int | None) -> StepResult:
    return StepResult(
        session=session,
        step=step,
        observation=seen.text,
        reward=seen.reward,
        terminated=seen.terminated,
        truncated=seen.truncated or (step == max_steps and not seen.terminated),
        admissible=None if seen.admissible is None else list(seen.admissible),
        anchor=seen.text,
        facts=dict(seen.facts),
        accepted=seen.accepted,
    )
