"""Serves an environment, in this process or in several that share a port.

Invariants
- The ready file appears only once connections are accepted, and is removed when the server ends.
"""

from __future__ import annotations

import logging
import resource

from fastapi import FastAPI

from env_servers.environment import Environment, TaskError
from env_servers.errors import ServerError
from env_servers.server import uvicorn_server
from env_servers.server.app import create_app
from env_servers.server.settings import ServerSettings
from env_servers.server.sockets import announce, listen, require_place, url_of
from env_servers.server.supervisor import supervise

__all__ = ["create_app", "serve"]

logger = logging.getLogger(__name__)


def serve(environment: type[Environment], settings: ServerSettings) -> None:
    """Serve `environment` until SIGTERM or SIGINT.

    Raises:
        ServerError: the address cannot be used or is not loopback and there is no token; the environment cannot offer
            its tasks; the ready file cannot be written; or worker processes keep ending.
    """
    if settings.ready_file is not None:
        require_place(settings.ready_file)
    _allow_many_connections()
    try:
        if settings.workers > 1:
            supervise(environment, settings)
        else:
            _serve_here(environment, settings)
    except TaskError as error:
        raise ServerError(f"environment {environment.name} cannot be served: {error}") from error
    finally:
        if settings.ready_file is not None:
            settings.ready_file.unlink(missing_ok=True)


def _serve_here(environment: type[Environment], settings: ServerSettings) -> None:
    with listen(settings) as listener:
        app: FastAPI = create_app(environment, settings)
        url = url_of(listener)

        def tell() -> None:
            if settings.ready_file is not None:
                announce(settings.ready_file, url)
            logger.info("serving %s at %s", environment.name, url)

        uvicorn_server.run(app, listener, settings, tell)


def _allow_many_connections() -> None:
    """Raise the limit of open files to its maximum: every connection is one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
