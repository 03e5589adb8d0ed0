"""One WebSocket to an OpenEnv server: a message, its answer, and the server's pings in between.

Invariants
- The socket is read all the time: a server that pings while its agent thinks gets its pong.
- One message at a time. Without an answer in time the socket ends: a late answer would be taken for the next one's.
"""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import orjson

from env_servers.clients.foreign_json import read_json

MAX_ANSWER_BYTES = 64 * 1024 * 1024


class SocketLost(Exception):
    """The socket is gone, or the server did not answer in time."""


class ServerRefusal(Exception):
    """The server answered with an error message. `code`: OpenEnv's code of it."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Socket:
    """A socket that is open. Make one with `connect`."""

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
        """Send a message and give the data of its answer.

        Raises:
            SocketLost. ServerRefusal. TypeError: the data is no JSON.
        """
        message = {"type": kind} if data is None else {"type": kind, "data": data}
        text = orjson.dumps(message).decode()
        async with self._one:
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
        """Close the socket. Any number of times."""
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
            if message.type is not aiohttp.WSMsgType.TEXT and message.type is not aiohttp.WSMsgType.BINARY:
                return


def _data_of(message: aiohttp.WSMessage) -> dict[str, Any]:
    if message.type is not aiohttp.WSMsgType.TEXT and message.type is not aiohttp.WSMsgType.BINARY:
        raise SocketLost("the server closed the connection")
    try:
        answer = read_json(message.data)
    except ValueError as error:
        raise SocketLost("the server does not speak OpenEnv: its answer is no JSON") from error
    data = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(data, dict):
        raise SocketLost("the server does not speak OpenEnv: its answer has no data")
    if answer.get("type") == "error":
        raise ServerRefusal(str(data.get("code", "")), _reason(data))
    return data


def _reason(data: dict[str, Any]) -> str:
    """An error's message, with the fields that it is about where the server names them (pydantic's errors)."""
    message = str(data.get("message", "the server gave no reason"))
    errors = data.get("errors")
    told = [
        f"{'.'.join(map(str, error.get('loc') or ()))}: {error.get('msg', '')}"
        for error in (errors if isinstance(errors, list) else ())
        if isinstance(error, dict)
    ]
    return f"{message}: {'; '.join(told)}" if told else message
