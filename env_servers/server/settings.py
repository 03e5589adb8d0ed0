"""Settings of an environment server."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from env_servers.sessions.table import CALL_SECONDS

TOKEN_VARIABLE = "ANCHORAGE_ENV_TOKEN"


def token_from(variable: str) -> SecretStr | None:
    """The token in an environment variable; None if it is unset or empty."""
    value = os.environ.get(variable, "")
    return SecretStr(value) if value else None


class ServerSettings(BaseModel):
    """Options of a server; the command line has the same names."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    host: str = "127.0.0.1"
    """Address to listen on. Beyond loopback a token is required."""
    port: int = Field(8001, ge=0, le=65535)
    """Port to listen on; 0: a free port, see `ready_file`."""
    token: SecretStr | None = Field(default_factory=lambda: token_from(TOKEN_VARIABLE))
    """Bearer token that every request except /health must send; none: no token is required."""
    max_sessions: int = Field(4096, ge=1)
    """Maximum number of live sessions; a further reset gets 503."""
    idle_seconds: float = Field(600.0, gt=0)
    """A session that is idle for this long is closed."""
    max_body_bytes: int = Field(1024 * 1024, ge=1024)
    """Maximum length of a request body (a longer one gets 413) or WebSocket message (a longer one closes it)."""
    max_requests: int = Field(8192, ge=1)
    """Maximum number of concurrent requests; a further one gets 503."""
    workers: int = Field(1, ge=1, le=256)
    """Processes that share the port. A session stays in its process."""
    threads: int = Field(8, ge=1)
    """Threads of each process for the calls of a blocking environment."""
    call_seconds: float = Field(CALL_SECONDS, gt=0)
    """Time limit of a reset or step of a blocking environment; a longer one fails its session only."""
    ready_file: Path | None = None
    """File to write the server's URL to once it accepts connections; removed when the server ends."""

    @model_validator(mode="after")
    def _room_for_every_worker(self) -> ServerSettings:
        if self.max_sessions < self.workers:
            raise ValueError(f"max_sessions must be >= workers ({self.workers}), got {self.max_sessions}")
        return self
