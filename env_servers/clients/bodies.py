"""Addresses and response bodies of servers of unknown quality: what every client checks before it reads on."""

from __future__ import annotations

import ipaddress

import aiohttp
from yarl import URL

MAX_ANSWER_BYTES = 64 * 1024 * 1024
"""Largest response or WebSocket message that is read, after decompression."""


class AnswerTooLong(Exception):
    """A response body is longer than `MAX_ANSWER_BYTES`."""


def server_url(url: str, kind: str) -> URL:
    """The address of a server.

    Args:
        url: `http://host:port` or `https://…`, with a path if the server has one.
        kind: name of the server in the error message, such as `an environment server`.

    Raises:
        ValueError: `url` is no such address.
    """
    try:
        parsed = URL(url)
        valid = parsed.scheme in ("http", "https") and bool(parsed.host)
    except ValueError:  # such as a port that is no number
        valid = False
    if not valid:
        raise ValueError(f"{url!r} is not the address of {kind}: write http://host:port")
    return parsed


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def read_body(response: aiohttp.ClientResponse) -> bytes:
    """The body of a response, decompressed.

    Raises:
        AnswerTooLong: it is longer than `MAX_ANSWER_BYTES`. Nothing beyond that is read, so a compressed body that
            expands to gigabytes costs no memory.
    """
    body = bytearray()
    async for part in response.content.iter_any():
        body += part
        if len(body) > MAX_ANSWER_BYTES:
            response.close()
            raise AnswerTooLong(f"the answer is longer than {MAX_ANSWER_BYTES >> 20} MiB")
    return bytes(body)
