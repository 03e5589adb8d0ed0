"""Runs one application in this process until a signal stops it."""

from __future__ import annotations

import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from env_servers.server.http_protocol import BufferedHttpProtocol
from env_servers.server.settings import ServerSettings

KEEP_ALIVE_S = 75
GRACE_S = 5


def run(app: FastAPI, listener: socket.socket, settings: ServerSettings, on_ready: Callable[[], None]) -> None:
    """Serve an application until SIGTERM or SIGINT; a second signal stops at once.

    Args:
        app: the application.
        listener: a listening socket.
        settings: limits of the server.
        on_ready: called once connections are accepted.
    """
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http=BufferedHttpProtocol,
        ws="websockets-sansio",
        ws_max_size=settings.max_body_bytes,
        ws_per_message_deflate=False,
        lifespan="on",
        access_log=False,
        log_config=None,
        log_level="warning",
        server_header=False,
        date_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S,
    )
    _Server(config, on_ready).run([listener])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn's own handler raises the signal again at the end, as if stopping on request were a failure.
        self.force_exit = self.should_exit
        self.should_exit = True
