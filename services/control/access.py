"""Authentication and rate limit: bearer tokens of two roles.

Invariants
- Both tokens are compared on every request, in constant time.
- The number of remembered clients is bounded. A wrong token costs as much as `WRONG_TOKEN_COST` requests.
"""

from __future__ import annotations

import enum
import hmac
import math
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, HTTPException, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from services.control.settings import ControlSettings

WRONG_TOKEN_COST = 30
MAX_CLIENTS = 4096

_bearer = HTTPBearer(auto_error=False, description="The read token, or the admin token, which also allows actions.")


class Role(enum.StrEnum):
    """What a caller may do: look, or also act."""

    READ = "read"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of a request.

    Attributes:
        role: role of the token.
        address: address that the request came from.
    """

    role: Role
    address: str

    def __str__(self) -> str:
        return f"{self.role}@{self.address}"


class RateLimiter:
    """A token bucket for each client: `per_minute` requests on average, and as many in a burst."""

    def __init__(self, per_minute: int) -> None:
        self._burst = float(per_minute)
        self._rate = per_minute / 60
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str, cost: float = 1.0) -> float:
        """Take `cost` requests from a client's bucket. Returns 0, or the seconds to wait if the bucket is empty."""
        now = time.monotonic()
        left, since = self._left.pop(client, (self._burst, now))
        left = min(self._burst, left + (now - since) * self._rate)
        allowed = left >= 1
        self._left[client] = (left - cost if allowed else left, now)
        while len(self._left) > MAX_CLIENTS:
            self._left.popitem(last=False)
        return 0.0 if allowed else (1 - left) / self._rate


class Authenticator:
    """Identifies the caller of a request, or refuses it."""

    def __init__(self, settings: ControlSettings) -> None:
        self._open = settings.open
        self._tokens = {
            role: token.get_secret_value().encode()
            for role, token in ((Role.READ, settings.read_token), (Role.ADMIN, settings.admin_token))
            if token is not None
        }
        self._limiter = RateLimiter(settings.requests_per_minute)

    @property
    def open(self) -> bool:
        """Whether no token is required."""
        return self._open

    def authenticate(self, address: str, token: str | None) -> Caller:
        """The caller at `address` with `token`.

        Raises:
            HTTPException: 401 for a missing or invalid token, 429 beyond the rate limit.
        """
        self._limit(address, 1)
        if self._open:
            return Caller(Role.ADMIN, address)
        role = None
        for candidate, expected in self._tokens.items():
            if hmac.compare_digest((token or "").encode(), expected):
                role = candidate
        if role is None:
            if token is not None:
                self._limit(address, WRONG_TOKEN_COST)
            raise HTTPException(401, "missing or invalid bearer token", {"WWW-Authenticate": "Bearer"})
        return Caller(role, address)

    def _limit(self, address: str, cost: float) -> None:
        wait_s = self._limiter.take(address, cost)
        if wait_s:
            raise HTTPException(
                429, f"too many requests: retry in {math.ceil(wait_s)} s", {"Retry-After": str(math.ceil(wait_s))}
            )


async def caller(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> Caller:
    """Dependency of every route that shows data: the caller, or a refusal."""
    authenticator: Authenticator = request.app.state.authenticator
    address = request.client.host if request.client else "unknown"
    return authenticator.authenticate(address, credentials.credentials if credentials else None)


Reader = Annotated[Caller, Depends(caller)]
