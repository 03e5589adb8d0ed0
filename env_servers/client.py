"""Clients of environment servers: over HTTP or over OpenEnv, with the same answers and errors.

`env_servers.clients.local` plays in this process instead; it is not imported here, since it brings the server's
session table with it.
"""

from __future__ import annotations

from env_servers.clients.http import HttpClient
from env_servers.clients.interface import (
    ActionRefused,
    EnvironmentClient,
    EnvironmentFailed,
    EnvironmentUnavailableError,
    RequestRejected,
    SessionLost,
)
from env_servers.clients.openenv import OpenEnvClient

__all__ = [
    "ActionRefused",
    "EnvironmentClient",
    "EnvironmentFailed",
    "EnvironmentUnavailableError",
    "HttpClient",
    "OpenEnvClient",
    "RequestRejected",
    "SessionLost",
    "open_client",
]

OPENENV_PREFIX = "openenv+"


def open_client(
    url: str, *, token: str | None = None, timeout_s: float = 30.0, connections: int = 256, patience_s: float = 60.0
) -> EnvironmentClient:
    """A client of the server at `url`: `http://…` speaks the step API, `openenv+http://…` any OpenEnv server."""
    kind = OpenEnvClient if url.startswith(OPENENV_PREFIX) else HttpClient
    address = url.removeprefix(OPENENV_PREFIX)
    return kind(address, token=token, timeout_s=timeout_s, connections=connections, patience_s=patience_s)
