"""`/ws`: one OpenEnv session a WebSocket, in the same session table as all others.

Invariants
- A socket holds at most one session, and the session ends with it.
- An invalid message gets an error message and leaves the socket open.
- A socket without a message for as long as a session may be idle is closed.
- The next message of a socket is read after the last one was answered.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from urllib.parse import urlsplit

from pydantic import ValidationError
from pydantic_core import to_json
from starlette.responses import PlainTextResponse
from starlette.websockets import WebSocket, WebSocketDisconnect

from env_servers.environment import TaskError
from env_servers.errors import summary
from env_servers.openenv.wire import (
    INCOMING,
    CloseMessage,
    ErrorCode,
    McpMessage,
    ResetData,
    ResetMessage,
    State,
    StepMessage,
    error_data,
    json_rpc,
    observation_data,
)
from env_servers.protocol import ResetRequest, StepRequest
from env_servers.sessions.table import Busy, SessionError, SessionUnknown
from env_servers.workers.sessions import ServerSessions

logger = logging.getLogger(__name__)

CLOSED_IDLE = 1000
CLOSED_FULL = 1013
CLOSED_ERROR = 1011


def socket_endpoint(sessions: ServerSessions) -> Callable[[WebSocket], Awaitable[None]]:
    """The endpoint of `/ws`. A process accepts as many sockets as the server has sessions."""
    sockets = 0

    async def serve(websocket: WebSocket) -> None:
        nonlocal sockets
        if _is_foreign_page(websocket):
            await websocket.send_denial_response(PlainTextResponse("cross-origin requests are not allowed\n", 403))
            return
        await websocket.accept()
        sockets += 1
        player = Player(sessions)
        most = sessions.info.max_sessions
        try:
            if sockets > most:
                await _send(websocket, "error", _full(f"all {most} sockets are in use: retry later", most))
                await websocket.close(CLOSED_FULL)
                return
            await _converse(websocket, player, sessions.info.idle_seconds)
        except WebSocketDisconnect:
            logger.debug("the client closed its WebSocket")
        except Exception:
            logger.exception("unexpected error on a WebSocket")
            with suppress(WebSocketDisconnect, RuntimeError):
                await websocket.close(CLOSED_ERROR, "unexpected error: see the server's log")
        finally:
            sockets -= 1
            await player.end()

    return serve


class Player:
    """The session of one socket."""

    def __init__(self, sessions: ServerSessions) -> None:
        self._sessions = sessions
        self._request: ResetRequest | None = None
        self._session: str | None = None
        self._episode: str | None = None
        self._steps = 0

    async def answer(self, raw: str | bytes) -> tuple[str, dict[str, object]] | None:
        """Type and data of the answer to a message; None for a close message."""
        try:
            match INCOMING.validate_json(raw):
                case ResetMessage(data=data):
                    return "observation", await self._reset(data)
                case StepMessage(data=data):
                    return "observation", await self._step(data.action)
                case McpMessage(data=data):
                    return "mcp", json_rpc(data)
                case CloseMessage():
                    return None
                case _:
                    return "state", self._state()
        except ValidationError as error:
            return "error", error_data(_code_of(error), summary(error))
        except Busy as error:
            return "error", _full(str(error), self._sessions.info.max_sessions)
        except SessionUnknown as error:
            self._session = None
            return "error", error_data(ErrorCode.SESSION_ERROR, str(error))
        except (SessionError, TaskError) as error:
            return "error", error_data(ErrorCode.EXECUTION_ERROR, str(error))

    async def end(self) -> None:
        """Close the session, if there is one."""
        session, self._session = self._session, None
        if session is not None:
            with suppress(SessionUnknown):
                await self._sessions.close(session)

    async def _reset(self, data: ResetData) -> dict[str, object]:
        await self.end()
        request = self._task_of(data)
        result = await self._sessions.reset(request)
        self._request, self._session, self._steps = request, result.session, 0
        self._episode = data.episode_id or result.session
        return observation_data(request, result)

    async def _step(self, action: str) -> dict[str, object]:
        if self._session is None or self._request is None:
            raise SessionUnknown("no episode: reset first")
        result = await self._sessions.step(StepRequest(session=self._session, step=self._steps + 1, action=action))
        self._steps = result.step
        return observation_data(self._request, result)

    def _state(self) -> dict[str, object]:
        if self._request is None:
            return State().model_dump()
        return State(
            episode_id=self._episode, step_count=self._steps, split=self._request.split, index=self._request.index
        ).model_dump()

    def _task_of(self, data: ResetData) -> ResetRequest:
        splits = self._sessions.info.splits
        split = data.split if data.split is not None else next(iter(splits))
        size = max(1, splits.get(split, 1))
        index = data.index
        if index is None:
            index = random.randrange(size) if data.seed is None else data.seed % size
        return ResetRequest(split=split, index=index, anchor=data.anchor, max_steps=data.max_steps, expert=data.expert)


async def _converse(websocket: WebSocket, player: Player, idle_s: float) -> None:
    while True:
        try:
            async with asyncio.timeout(idle_s):
                message = await websocket.receive()
        except TimeoutError:
            await websocket.close(CLOSED_IDLE, "idle")
            return
        if message["type"] == "websocket.disconnect":
            return
        answer = await player.answer(message.get("text") or message.get("bytes") or "")
        if answer is None:
            await websocket.close()
            return
        await _send(websocket, *answer)


async def _send(websocket: WebSocket, kind: str, data: dict[str, object]) -> None:
    await websocket.send_text(to_json({"type": kind, "data": data}, inf_nan_mode="null").decode())


def _full(message: str, most: int) -> dict[str, object]:
    return error_data(ErrorCode.CAPACITY_REACHED, message, max_sessions=most)


def _code_of(error: ValidationError) -> ErrorCode:
    match error.errors(include_url=False, include_context=False, include_input=False)[0]["type"]:
        case "json_invalid":
            return ErrorCode.INVALID_JSON
        case "union_tag_invalid" | "union_tag_not_found":
            return ErrorCode.UNKNOWN_TYPE
        case _:
            return ErrorCode.VALIDATION_ERROR


def _is_foreign_page(websocket: WebSocket) -> bool:
    """Whether a page of another site opens the socket. Browsers allow it and name the site in `Origin`."""
    origin = websocket.headers.get("origin")
    return origin is not None and urlsplit(origin).netloc != websocket.headers.get("host")
