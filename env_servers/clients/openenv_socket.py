"""One WebSocket to an OpenEnv server: a message, then its answer, and the server's pings at any time.

Invariants
- The socket is read continuously, so a server that pings while the agent thinks gets its pong.
- One message at a time. If an answer does not come in time, or one comes that nothing was sent for, the socket is
  closed: OpenEnv's messages have no ids, and a late or extra answer would be taken for that of the next message.
"""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import orjson

from env_servers.clients.bodies import MAX_ANSWER_BYTES
from env_servers.clients.foreign_json import read_json
from env_servers.errors import SHOWN_ERRORS, one_line


class SocketLost(Exception):
    """The connection is closed, the server did not answer in time, or its answer is no OpenEnv message."""


class ServerRefusal(Exception):
    """The server answered with an error message.

    Attributes:
        code: OpenEnv's code of the error.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Socket:
    """An open socket. Create one with `connect`."""

    def __init__(self, websocket: aiohttp.ClientWebSocketResponse, timeout_s: float) -> None:
        self._websocket = websocket
        self._timeout_s = timeout_s
        self._answers: asyncio.Queue[aiohttp.WSMessage] = asyncio.Queue(1)
        self._reader = asyncio.create_task(self._read())
        self._one = asyncio.Lock()

    @classmethod
    async def connect(cls, http: aiohttp.ClientSession, url: str, headers: dict[str, str], timeout_s: float) -> Socket:
        """Open a socket. Raises SocketLost."""
        try:
            async with asyncio.timeout(timeout_s):
                websocket = await http.ws_connect(url, headers=headers, max_msg_size=MAX_ANSWER_BYTES)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise SocketLost(str(error) or f"no answer within {timeout_s:g} s") from error
        return cls(websocket, timeout_s)

    async def ask(self, kind: str, data: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send a message and return the data of its answer.

        Raises:
            SocketLost: no valid answer; the socket is of no more use.
            ServerRefusal: the answer is an error message.
            TypeError: the data cannot be written as JSON.
        """
        message = {"type": kind} if data is None else {"type": kind, "data": data}
        text = orjson.dumps(message).decode()
        async with self._one:
            if not self._answers.empty():
                extra = self._answers.get_nowait()
                await self.close()
                raise SocketLost("the server closed the connection" if _is_end(extra) else "unexpected message")
            try:
                async with asyncio.timeout(self._timeout_s):
                    await self._websocket.send_str(text)
                    answer = await self._answers.get()
            except TimeoutError as error:
                await self.close()
                raise SocketLost(f"no answer within {self._timeout_s:g} s") from error
            except (aiohttp.ClientError, ConnectionError) as error:
                raise SocketLost(str(error) or "the connection is closed") from error
        return _data_of(answer)

    async def close(self) -> None:
        """Close the socket. May be called again."""
        self._reader.cancel()
        try:
            async with asyncio.timeout(1.0):
                await self._websocket.close()
        except TimeoutError:
            pass

    async def _read(self) -> None:
        while True:
            message = await self._websocket.receive()
            await self._answers.put(message)
            if _is_end(message):
                return


def _is_end(message: aiohttp.WSMessage) -> bool:
    """Whether it is the end of the connection rather than data."""
    return message.type is not aiohttp.WSMsgType.TEXT and message.type is not aiohttp.WSMsgType.BINARY


def _data_of(message: aiohttp.WSMessage) -> dict[str, Any]:
    if message.type is aiohttp.WSMsgType.ERROR:  # such as a message that is too long, or text that is no UTF-8
        raise SocketLost(f"invalid WebSocket message: {one_line(message.data)}")
    if _is_end(message):
        raise SocketLost("the server closed the connection")
    try:
        answer = read_json(message.data)
    except ValueError as error:
        raise SocketLost("the server does not speak OpenEnv: invalid JSON") from error
    data = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(data, dict):
        raise SocketLost("the server does not speak OpenEnv: an answer without data")
    if answer.get("type") == "error":
        raise ServerRefusal(str(data.get("code", "")), _reason(data))
    return data


def _reason(data: dict[str, Any]) -> str:
    """The message of an error, with the fields that it concerns where the server names them (pydantic's errors)."""
    message = str(data.get("message", "the server gave no reason"))
    errors = data.get("errors")
    fields = []
    for error in (errors if isinstance(errors, list) else [])[:SHOWN_ERRORS]:
        if isinstance(error, dict):
            where = error.get("loc")
            path = ".".join(map(str, where)) if isinstance(where, list) else ""
            fields.append(f"{path}: {error.get('msg', '')}")
    return f"{message}: {'; '.join(fields)}" if fields else message
