"""Addresses in the configuration: text that is checked when it is read; messages do not show it."""

from __future__ import annotations

import re
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator

_HTTP = ("http", "https", "openenv+http", "openenv+https")
_REDIS = ("redis", "rediss", "unix")


def _http(url: str) -> str:
    if not _is_address(url, _HTTP):
        raise ValueError("must be the address of a server, as http://host:8001 or openenv+http://host:8001")
    return url


def is_redis_address(url: str) -> bool:
    """Whether it names a Redis, and of its databases one by its number: redis-py takes any other path for 0."""
    if not _is_address(url, _REDIS):
        return False
    parts = urlsplit(url)
    return parts.scheme == "unix" or re.fullmatch(r"/?[0-9]*", parts.path) is not None


def _redis(url: str) -> str:
    if not is_redis_address(url):
        raise ValueError(
            "must be the address of a Redis: redis://host:6379/0 (rediss:// for TLS, unix:// for a socket)"
        )
    return url


def _is_address(url: str, schemes: tuple[str, ...]) -> bool:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return False
    known = parts.scheme in schemes and url.startswith(f"{parts.scheme}://")
    return known and (bool(parts.path) if parts.scheme == "unix" else parts.hostname is not None)


HttpAddress = Annotated[str, AfterValidator(_http)]
"""Of an environment's server."""
RedisAddress = Annotated[str, AfterValidator(_redis)]
"""Of a Redis."""
