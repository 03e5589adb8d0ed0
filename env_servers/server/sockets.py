"""Where a server listens: its address, its socket, its ready file.

Invariants
- Beyond loopback nothing listens without a token.
- The ready file appears whole.
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
    """A listening socket. Raises ServerError."""
    return _open(settings, settings.port, shared=False, listening=True)


def reserve(settings: ServerSettings) -> socket.socket:
    """A bound socket that keeps a port for the processes that share it. Raises ServerError, also where it is taken."""
    with listen(settings) as probe:
        port = probe.getsockname()[1]
    return _open(settings, port, shared=True, listening=False)


def join(settings: ServerSettings, reserved: socket.socket) -> socket.socket:
    """One process's own listening socket on a reserved port; the kernel spreads connections over all of them."""
    return _open(settings, reserved.getsockname()[1], shared=True, listening=True)


def url_of(listener: socket.socket) -> str:
    """A URL under which this machine reaches the listener."""
    host, port = listener.getsockname()[:2]
    address = ipaddress.ip_address(host)
    if address.is_unspecified:
        address = ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")
    return f"http://[{address}]:{port}" if address.version == 6 else f"http://{address}:{port}"


def require_place(ready_file: Path) -> None:
    """Raise ServerError where the ready file cannot be written. Leaves no trace."""
    try:
        _draft(ready_file).touch()
        _draft(ready_file).unlink()
    except OSError as error:
        raise ServerError(f"cannot write {ready_file}: {error.strerror}") from None


def _draft(ready_file: Path) -> Path:
    return ready_file.with_name(f".{ready_file.name}.{os.getpid()}")


def announce(ready_file: Path, url: str) -> None:
    """Write the ready file."""
    draft = _draft(ready_file)
    draft.write_text(f"{url}\n")
    draft.replace(ready_file)


def _open(settings: ServerSettings, port: int, *, shared: bool, listening: bool) -> socket.socket:
    host = settings.host
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ServerError(f"host {host} cannot be resolved: choose another with --host") from error
    family, kind, protocol, _, address = found[0]
    if settings.token is None and not ipaddress.ip_address(address[0]).is_loopback:
        raise ServerError(f"listening on {host} needs a token: set {TOKEN_VARIABLE}, or listen on 127.0.0.1")
    opened = socket.socket(family, kind, protocol)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT if shared else socket.SO_REUSEADDR, 1)
    try:
        opened.bind(address)
        if listening:
            opened.listen(BACKLOG)
    except OSError as error:
        opened.close()
        if error.errno == errno.EADDRINUSE:
            raise ServerError(f"port {port} on {host} is taken: choose another with --port") from error
        raise ServerError(f"cannot listen on port {port} of {host}: {error.strerror}") from error
    return opened
