"""Settings of an environment server."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, SecretStr

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
    """Longest request body; a longer one is answered 413."""
    workers: int = Field(8, ge=1)
    """Threads that run a blocking environment."""
    ready_file: Path | None = None
    """File that gets the server's URL once it listens, and goes away when the server ends."""
