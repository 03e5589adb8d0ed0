"""Settings of the control plane, and the rules for its address and tokens.

Invariants
- Without a token it listens only on loopback. If any token is set, every request for data requires one.
- Tokens come from environment variables or files, never from the command line.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from services.errors import AnchorageError

READ_TOKEN_VARIABLE = "ANCHORAGE_CONTROL_READ_TOKEN"
ADMIN_TOKEN_VARIABLE = "ANCHORAGE_CONTROL_ADMIN_TOKEN"
SHORTEST_TOKEN = 16


class ControlRefused(AnchorageError):
    """The settings are unsafe, or the control plane cannot listen on its address."""


class ControlSettings(BaseModel):
    """Options of the control plane; the command line has the same names."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    runs: Path
    """Folder of the runs."""
    host: str = "127.0.0.1"
    """Address to listen on. Beyond loopback a token is required."""
    port: int = Field(8080, ge=0, le=65535)
    """Port to listen on; 0: a free port, see `ready_file`."""
    read_token: SecretStr | None = None
    """Bearer token that allows reading."""
    admin_token: SecretStr | None = None
    """Bearer token that also allows actions."""
    requests_per_minute: int = Field(1200, ge=1)
    """Rate limit of each client address; above it the response is 429."""
    max_streams: int = Field(64, ge=1)
    """Maximum number of concurrent event streams; a further one gets 429."""
    ready_file: Path | None = None
    """File to write the server's URL to once it accepts connections."""

    @property
    def open(self) -> bool:
        """Whether no token is set, so that everybody who reaches the port may do everything."""
        return self.read_token is None and self.admin_token is None

    def check(self) -> None:
        """Raise ControlRefused if the settings are unsafe or the runs' folder is missing."""
        if not self.runs.is_dir():
            raise ControlRefused(f"not a directory: {self.runs}; name the folder of the runs (run.dir)")
        if self.open and not is_loopback(self.host):
            raise ControlRefused(
                f"listening on {self.host} requires a token: "
                f"set {READ_TOKEN_VARIABLE} and {ADMIN_TOKEN_VARIABLE} (or …_FILE), or listen on 127.0.0.1"
            )
        for name, token in ((READ_TOKEN_VARIABLE, self.read_token), (ADMIN_TOKEN_VARIABLE, self.admin_token)):
            if token is not None and len(token.get_secret_value()) < SHORTEST_TOKEN:
                raise ControlRefused(f"{name} must have at least {SHORTEST_TOKEN} characters")
        if self.read_token is not None and self.read_token == self.admin_token:
            raise ControlRefused(f"{READ_TOKEN_VARIABLE} and {ADMIN_TOKEN_VARIABLE} must differ")


def token_from(variable: str, environment: Mapping[str, str] = os.environ) -> SecretStr | None:
    """The token in `$variable`, or in the file that `$variable_FILE` names; None if neither is set.

    Raises:
        ControlRefused: the file cannot be read or is empty, or both are set.
    """
    value, file = environment.get(variable), environment.get(f"{variable}_FILE")
    if value and file:
        raise ControlRefused(f"both {variable} and {variable}_FILE are set: set one of them")
    if not file:
        return SecretStr(value) if value else None
    try:
        value = Path(file).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ControlRefused(f"cannot read the token file {file} ({variable}_FILE): {error}") from None
    if not value:
        raise ControlRefused(f"the token file {file} ({variable}_FILE) is empty")
    return SecretStr(value)


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
