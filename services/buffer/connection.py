"""The connection to Redis: timeouts, one layer of retries, and one clear line when it fails.

Invariants
- Every command has a timeout. An unreachable Redis is retried with back-off for `reconnect_s`, then RedisUnavailable.
- A command may have been executed although its reply was lost: whatever goes through `call` must be idempotent.
- No message and no log line contains a credential.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any, TypeVar
from urllib.parse import urlsplit

from redis import BlockingConnectionPool, Redis, exceptions
from redis.backoff import NoBackoff
from redis.retry import Retry

from services.backoff import Backoff
from services.buffer import keys
from services.config.addresses import is_redis_address
from services.config.tree import BufferConfig
from services.errors import RedisUnavailable, first_line

_log = logging.getLogger(__name__)

Arg = bytes | str | int | float

_T = TypeVar("_T")

MANY, FEW = 32, 4
"""Number of connections of one process: of one that serves many threads, and of one of many (an actor)."""
_BACKOFF = Backoff(0.05, 2.0, jitter=True)
_ALSO = {"take": ("install_owner",), "restore_owner": ("install_owner",)} | dict.fromkeys(
    ("card", "card_take", "card_renew", "card_give"), ("card_state",)
)
"""Lua that some scripts share, in addition to the prelude of all."""
_NO_ROOM = re.compile(r"maxmemory|MISCONF")
# Matched by text as well: the error of a command inside a script reaches the client as an error of the script.
_READ_ONLY = re.compile(r"\bREADONLY\b")
_DENIED = re.compile(r"\bNOPERM\b|user executing the script can't run|ACL failure in script")
_NOT_NOW = re.compile(r"\b(?:BUSY|NOREPLICAS|MASTERDOWN)\b")


class Connection:
    """A pool of connections to one Redis. Thread-safe.

    Attributes:
        client: for use inside `call`.
        where: the address without credentials, for messages.
    """

    def __init__(self, url: str, config: BufferConfig, most: int = MANY) -> None:
        """Does not connect yet, later at most `most` times at once.

        Raises:
            RedisUnavailable: `url` is not the address of a Redis.
        """
        self.where = mask(url)
        self._reconnect_s = config.reconnect_s
        try:
            pool = BlockingConnectionPool.from_url(
                url,
                max_connections=most,
                timeout=config.timeout_s,
                socket_timeout=config.timeout_s,
                socket_connect_timeout=config.timeout_s,
                retry=Retry(NoBackoff(), 0),
                protocol=2,
            )
        except (ValueError, TypeError):
            raise RedisUnavailable(_NOT_AN_ADDRESS) from None
        self.client = Redis(connection_pool=pool)

    def script(self, name: str, of: keys.Keys) -> Callable[[Sequence[Arg]], Any]:
        """The script `lua/<name>.lua` on a run's keys (`of`), as a function of its arguments."""
        folder = resources.files("services.buffer") / "lua"
        parts = ("prelude", *_ALSO.get(name, ()), name)
        body = "".join((folder / f"{part}.lua").read_text() for part in parts)
        named = keys.named_in(body)
        script, names = self.client.register_script(keys.bindings(named) + body), of.of(named)
        return lambda args: self.call(lambda: script(keys=names, args=args))

    def call(self, operation: Callable[[], _T]) -> _T:
        """Run `operation` and return its result, with retries while Redis is unreachable.

        Raises:
            RedisUnavailable: refused permanently, or unreachable for `reconnect_s`.
        """
        attempts = _BACKOFF.within(self._reconnect_s)
        while True:
            try:
                return operation()
            except exceptions.RedisError as error:
                problem = self._problem(error)
                if problem is None:
                    raise
                delay = None if _is_final(error) else attempts.next_delay()
                if delay is None:
                    raise RedisUnavailable(problem) from error
                if attempts.failures == 1:
                    _log.warning("%s; retrying for %g s", problem.rstrip("."), self._reconnect_s)
            time.sleep(delay)

    def close(self) -> None:
        """Close all connections."""
        self.client.close()
        self.client.connection_pool.disconnect()

    def _problem(self, error: exceptions.RedisError) -> str | None:
        """One line for the user, or None for an error that does not concern the availability of Redis."""
        if isinstance(error, exceptions.AuthenticationError | exceptions.AuthorizationError):
            return f"Redis at {self.where} refuses the user or password; check buffer.redis_url"
        if isinstance(error, exceptions.NoPermissionError) or _DENIED.search(str(error)):
            return f"Redis at {self.where} denies the user a command the buffer needs; check the user's ACL"
        if isinstance(error, exceptions.BusyLoadingError):
            return f"Redis at {self.where} is still loading its data"
        if isinstance(error, exceptions.ConnectionError | exceptions.TimeoutError):
            return f"cannot reach Redis at {self.where}: {' '.join(str(error).split())}"
        if isinstance(error, exceptions.ReadOnlyError) or _READ_ONLY.search(str(error)):
            return f"Redis at {self.where} is a read-only replica; name the primary in buffer.redis_url"
        reason = _NOT_NOW.search(str(error))
        if reason is not None or isinstance(error, exceptions.MasterDownError):
            # An error inside a script carries the script's name in front of it.
            reply = first_line(error) if reason is None else str(error)[reason.start() :].partition("\n")[0]
            return f"Redis at {self.where} cannot serve requests now: {reply}"
        if isinstance(error, exceptions.MovedError | exceptions.AskError | exceptions.ClusterDownError):
            return f"Redis at {self.where} is a node of a Redis Cluster; name a Redis of its own in buffer.redis_url"
        if _NO_ROOM.search(str(error)):
            return f"Redis at {self.where} cannot store data: its memory or its disk is full"
        return None


def mask(url: str) -> str:
    """The address without user, password and options. RedisUnavailable if it is not the address of a Redis."""
    if not is_redis_address(url):
        raise RedisUnavailable(_NOT_AN_ADDRESS)
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return f"unix://{parts.path}"
    return f"{parts.scheme}://{parts.hostname}:{parts.port or 6379}{parts.path}"


_NOT_AN_ADDRESS = (
    "buffer.redis_url (or $REDIS_URL) is not the address of a Redis; "
    "write redis://host:6379/0 (rediss:// for TLS, unix:// for a socket)"
)


def _is_final(error: exceptions.RedisError) -> bool:
    """Whether a retry cannot help."""
    return _DENIED.search(str(error)) is not None or isinstance(
        error,
        exceptions.AuthenticationError
        | exceptions.AuthorizationError
        | exceptions.NoPermissionError
        | exceptions.MovedError
        | exceptions.AskError,
    )
