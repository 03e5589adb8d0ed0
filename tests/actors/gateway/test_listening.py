"""The gateway's server."""

from __future__ import annotations

import socket

from starlette.applications import Starlette

from actors.gateway.listening import Listening


async def test_answers_do_not_wait_for_an_acknowledgement() -> None:
    listening = Listening(Starlette(), "127.0.0.1:0")
    await listening.start()
    try:
        assert listening._server is not None
        (listener,) = listening._server.servers[0].sockets
        assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
    finally:
        await listening.stop()
