"""Runs the gateway's application on the actor's event loop.

Invariants
- Signals and the end of the process are the actor's business: the server installs no handlers.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.applications import Starlette

from services.errors import AnchorageError

BACKLOG = 2048
KEEP_ALIVE_S = 75
GRACE_S = 2
START_S = 30.0
POLL_S = 0.01


class GatewayUnavailable(AnchorageError):
    """The gateway cannot listen on its address."""


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Listening:
    """The server of one application.

    Args:
        app: the application.
        address: `host:port`; port 0: a free one.
        advertise: URL as clients reach it; None: made of the address.
    """

    def __init__(self, app: Starlette, address: str, advertise: str | None = None) -> None:
        self._app = app
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self._advertise = advertise
        self._server: _Server | None = None
        self._serving: asyncio.Task[None] | None = None
        self._bound = 0

    @property
    def started(self) -> bool:
        """Whether it listens, or has listened."""
        return self._serving is not None

    @property
    def url(self) -> str:
        """Address as clients reach it, once started."""
        if self._advertise is not None:
            return self._advertise.rstrip("/")
        host = socket.gethostname() if self._host in ("0.0.0.0", "[::]") else self._host
        return f"http://{host}:{self._bound}"

    async def start(self) -> None:
        """Listen. Raises GatewayUnavailable."""
        host = self._host.strip("[]")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listener = socket.create_server((host, self._port), family=family, backlog=BACKLOG)
        except OSError as error:
            raise GatewayUnavailable(
                f"the gateway cannot listen on {self._host}:{self._port}: {error.strerror or error} (agent.listen)"
            ) from None
        # asyncio sets it for sockets that it has made itself only; without it, each answer waits 40 ms for an ACK.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._bound = listener.getsockname()[1]
        config = uvicorn.Config(
            self._app,
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=GRACE_S,
        )
        self._server = _Server(config)
        self._serving = asyncio.create_task(self._server.serve([listener]))
        async with asyncio.timeout(START_S):
            while not self._server.started:
                if self._serving.done():
                    self._serving.result()
                    raise GatewayUnavailable("the gateway ended as it started")
                await asyncio.sleep(POLL_S)

    async def stop(self) -> None:
        """Close all connections and stop listening. Idempotent."""
        if self._server is None or self._serving is None:
            return
        self._server.should_exit = True
        await asyncio.wait([self._serving], timeout=GRACE_S + 2)
        self._serving.cancel()
