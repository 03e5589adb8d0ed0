"""Settings of an environment server."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from env_servers.sessions.table import CALL_SECONDS

TOKEN_VARIABLE = "ANCHORAGE_ENV_TOKEN"


def token_from(variable: str) -> SecretStr | None:
    """The token in an environment variable; none where it is unset or empty."""
    value = os.environ.get(variable, "")
    return SecretStr(value) if value else None


class ServerSettings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    host: str = "127.0.0.1"
    """Address to listen on. Beyond loopback a token is required."""
    port: int = Field(8001, ge=0, le=65535)
    """Port to listen on; 0: a free one, see `ready_file`."""
    token: SecretStr | None = Field(default_factory=lambda: token_from(TOKEN_VARIABLE))
    """Bearer token of every request but health's; none: no token is asked for."""
    max_sessions: int = Field(4096, ge=1)
    """Live sessions at the same time; a reset beyond them is answered 503."""
    idle_seconds: float = Field(600.0, gt=0)
    """A session unused for this long is closed."""
    max_body_bytes: int = Field(1024 * 1024, ge=1024)
    """Longest request body or WebSocket message; a longer body is answered 413, a longer message closes its socket."""
    max_requests: int = Field(8192, ge=1)
    """Requests that are answered at the same time; a further one is answered 503."""
    workers: int = Field(1, ge=1, le=256)
    """Processes that share the port. A session stays on its process."""
    threads: int = Field(8, ge=1)
    """Threads of each process that run a blocking environment."""
    call_seconds: float = Field(CALL_SECONDS, gt=0)
    """Longest reset or step of a blocking environment; a longer one fails its session, and the others go on."""
    ready_file: Path | None = None
    """File that gets the server's URL once it listens, and goes away when the server ends."""

    @model_validator(mode="after")
    def _room_for_every_worker(self) -> ServerSettings:
        if self.max_sessions < self.workers:
            raise ValueError(f"max_sessions must be at least workers, {self.workers}")
        return self
