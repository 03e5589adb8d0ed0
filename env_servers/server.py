"""Running an environment server: its socket, its signals, its ready file.

Invariants
- Beyond loopback nothing is served without a token.
- The ready file appears, whole, only once the server accepts connections.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import socket
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from env_servers.app import create_app
from env_servers.environment import Environment, TaskError
from env_servers.errors import ServerError
from env_servers.settings import TOKEN_VARIABLE, ServerSettings

__all__ = ["create_app", "serve"]

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 75
GRACE_S = 5
BACKLOG = 2048


def serve(environment: type[Environment], settings: ServerSettings) -> None:
    """Serve `environment` until SIGTERM or SIGINT.

    Raises:
        ServerError: the address cannot be listened on, or is beyond loopback while there is no token, or the
            environment has no tasks to offer.
    """
    with _listen(settings) as listener:
        config = uvicorn.Config(
            _application(environment, settings),
            loop="uvloop",
            http="httptools",
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
        _Server(config, environment.name, _url(listener), settings.ready_file).run([listener])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, name: str, url: str, ready_file: Path | None) -> None:
        super().__init__(config)
        self._name = name
        self._url = url
        self._ready_file = ready_file

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._ready_file is not None:
            _announce(self._ready_file, self._url)
        logger.info("serving %s at %s", self._name, self._url)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._ready_file is not None:
            self._ready_file.unlink(missing_ok=True)
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn's own handler raises the signal again once it is done; being asked to stop is no failure here.
        self.force_exit = self.should_exit
        self.should_exit = True


def _application(environment: type[Environment], settings: ServerSettings) -> FastAPI:
    try:
        return create_app(environment, settings)
    except TaskError as error:
        raise ServerError(f"environment {environment.name} cannot be served: {error}") from error


def _listen(settings: ServerSettings) -> socket.socket:
    host, port = settings.host, settings.port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ServerError(f"host {host} cannot be resolved: choose another with --host") from error
    family, kind, protocol, _, address = found[0]
    if settings.token is None and not ipaddress.ip_address(address[0]).is_loopback:
        raise ServerError(f"listening on {host} needs a token: set {TOKEN_VARIABLE}, or listen on 127.0.0.1")
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ServerError(f"port {port} on {host} is taken: choose another with --port") from error
        raise ServerError(f"cannot listen on port {port} of {host}: {error.strerror}") from error
    return listener


def _url(listener: socket.socket) -> str:
    """A URL under which this machine reaches the listener."""
    host, port = listener.getsockname()[:2]
    address = ipaddress.ip_address(host)
    if address.is_unspecified:
        address = ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")
    return f"http://[{address}]:{port}" if address.version == 6 else f"http://{address}:{port}"


def _announce(ready_file: Path, url: str) -> None:
    draft = ready_file.with_name(f".{ready_file.name}.{os.getpid()}")
    draft.write_text(f"{url}\n")
    draft.replace(ready_file)
