"""uvicorn's HTTP protocol with one system call a response instead of two, and a time limit for silent connections.

uvicorn writes the head and the body of a response separately, and each write is a system call. On loopback that is half
the cost of a short response, on the server and on the client, which wakes up twice.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

FLUSH_BYTES = 64 * 1024
HEAD_LIMIT_S = 30.0
"""A new connection that has not sent the complete head of a request within this time is closed."""


class BufferedTransport:
    """A transport that sends all writes of one turn of the event loop together. Everything else is passed on."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._waiting: list[bytes] = []

    def write(self, data: bytes) -> None:
        if not self._waiting:
            self._loop.call_soon(self.flush)
        self._waiting.append(data)
        if len(data) >= FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        if self._waiting:
            data = b"".join(self._waiting)
            self._waiting.clear()
            if not self._transport.is_closing():
                self._transport.write(data)

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class BufferedHttpProtocol(HttpToolsProtocol):
    """Serves a connection through a buffered transport. A WebSocket upgrade keeps that transport."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        buffered = BufferedTransport(cast(asyncio.Transport, transport), self.loop)
        super().connection_made(cast(asyncio.Transport, buffered))
        self.loop.call_later(HEAD_LIMIT_S, self._close_if_silent)

    def _close_if_silent(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()
