"""Clients of environment servers, over HTTP or OpenEnv, with the same results and errors.

`env_servers.clients.local` plays in this process. It is not imported here, because it imports the server's session
table.
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
    """Create a client of the server at `url`. Nothing is sent yet.

    Args:
        url: `http://…` for the step API, `openenv+http://…` for any OpenEnv server.
        token: bearer token; none: the server requires none.
        timeout_s: time limit of one request.
        connections: maximum number of connections.
        patience_s: how long a request is retried while the server is unreachable or busy.

    Raises:
        ValueError: `url` is no address.

    Example:
        client = open_client("http://127.0.0.1:8001")
        state = await client.reset(ResetRequest(split="train", index=0))
        state = await client.step(state.session, 1, "look")
    """
    kind = OpenEnvClient if url.startswith(OPENENV_PREFIX) else HttpClient
    address = url.removeprefix(OPENENV_PREFIX)
    return kind(address, token=token, timeout_s=timeout_s, connections=connections, patience_s=patience_s)
