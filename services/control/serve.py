"""Runs the control plane in this process until a signal stops it."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from services.control.app import create_app
from services.control.comparison import Compare
from services.control.settings import ControlRefused, ControlSettings
from services.files import write_whole

GRACE_S = 5

log = logging.getLogger(__name__)


def serve(
    settings: ControlSettings, on_ready: Callable[[str], None] = lambda url: None, compare: Compare | None = None
) -> None:
    """Serve until SIGTERM or SIGINT; a second signal stops at once.

    Args:
        settings: options of the control plane.
        on_ready: called with the URL once connections are accepted.
        compare: the learner's estimators; None: groups are shown without a comparison.

    Raises:
        ControlRefused: the settings are unsafe, the runs' folder is missing, or the address is in use.
    """
    settings.check()
    app = create_app(settings, compare)
    listener = _listen(settings)
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    config = uvicorn.Config(
        app,
        access_log=False,
        log_config=None,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=GRACE_S,
        limit_concurrency=1000,
    )

    def ready() -> None:
        if settings.ready_file is not None:
            write_whole(settings.ready_file, url)
        on_ready(url)

    _Server(config, app, ready).run([listener])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, app: FastAPI, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._app = app
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn's own handler raises the signal again at the end, as if stopping on request were a failure.
        self._app.state.closing.set()
        self.force_exit = self.should_exit
        self.should_exit = True


def _listen(settings: ControlSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # asyncio sets it for sockets that it has made itself only; without it, an answer may wait 40 ms for an ACK.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise ControlRefused(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}; choose another --port"
        ) from None
    return listener
