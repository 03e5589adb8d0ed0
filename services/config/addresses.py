"""URLs in the configuration, validated on load. Error messages do not show them, since they may hold passwords."""

from __future__ import annotations

import re
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator

_HTTP = ("http", "https", "openenv+http", "openenv+https")
_REDIS = ("redis", "rediss", "unix")


def _http(url: str) -> str:
    if not _is_address(url, _HTTP):
        raise ValueError("must be the URL of a server, such as http://host:8001 or openenv+http://host:8001")
    return url


def is_redis_address(url: str) -> bool:
    """Return whether this is a Redis URL whose path, if any, is a database number: redis-py reads other paths as 0."""
    if not _is_address(url, _REDIS):
        return False
    parts = urlsplit(url)
    return parts.scheme == "unix" or re.fullmatch(r"/?[0-9]*", parts.path) is not None


def _redis(url: str) -> str:
    if not is_redis_address(url):
        raise ValueError(
            "must be the URL of a Redis, such as redis://host:6379/0 (rediss:// for TLS, unix:// for a socket)"
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
"""URL of an environment server."""
RedisAddress = Annotated[str, AfterValidator(_redis)]
"""URL of a Redis."""
