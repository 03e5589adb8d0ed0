"""A server's listening socket, its URL and its ready file.

Invariants
- Without a token nothing listens beyond loopback.
- The ready file is written atomically.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from pathlib import Path

from env_servers.errors import ServerError
from env_servers.server.settings import TOKEN_VARIABLE, ServerSettings

BACKLOG = 2048


def listen(settings: ServerSettings) -> socket.socket:
    """Open a listening socket. Raises ServerError."""
    return _open(settings, settings.port, shared=False, listening=True)


def reserve(settings: ServerSettings) -> socket.socket:
    """Open a bound socket that keeps a port for the processes that share it. Raises ServerError if it is in use."""
    with listen(settings) as probe:
        port = probe.getsockname()[1]
    return _open(settings, port, shared=True, listening=False)


def join(settings: ServerSettings, reserved: socket.socket) -> socket.socket:
    """Open one process's listening socket on a reserved port. The kernel spreads connections over all of them."""
    return _open(settings, reserved.getsockname()[1], shared=True, listening=True)


def url_of(listener: socket.socket) -> str:
    """The URL at which this machine reaches the listener."""
    host, port = listener.getsockname()[:2]
    address = ipaddress.ip_address(host)
    if address.is_unspecified:
        address = ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")
    return f"http://[{address}]:{port}" if address.version == 6 else f"http://{address}:{port}"


def require_place(ready_file: Path) -> None:
    """Raise ServerError if the ready file cannot be written. Leaves no file behind."""
    try:
        _draft(ready_file).touch()
        _draft(ready_file).unlink()
    except OSError as error:
        raise ServerError(f"cannot write {ready_file}: {error.strerror}") from None


def _draft(ready_file: Path) -> Path:
    return ready_file.with_name(f".{ready_file.name}.{os.getpid()}")


def announce(ready_file: Path, url: str) -> None:
    """Write the server's URL to the ready file."""
    draft = _draft(ready_file)
    draft.write_text(f"{url}\n")
    draft.replace(ready_file)


def _open(settings: ServerSettings, port: int, *, shared: bool, listening: bool) -> socket.socket:
    host = settings.host
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ServerError(f"cannot resolve host {host}: choose another with --host") from error
    family, kind, protocol, _, address = found[0]
    if settings.token is None and not ipaddress.ip_address(address[0]).is_loopback:
        raise ServerError(f"listening on {host} requires a token: set {TOKEN_VARIABLE}, or listen on 127.0.0.1")
    opened = socket.socket(family, kind, protocol)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT if shared else socket.SO_REUSEADDR, 1)
    try:
        opened.bind(address)
        if listening:
            opened.listen(BACKLOG)
    except OSError as error:
        opened.close()
        if error.errno == errno.EADDRINUSE:
            raise ServerError(f"port {port} on {host} is in use: choose another with --port") from error
        raise ServerError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return opened
