"""Coordination between publisher and readers of a collective channel through a few small keys in Redis.

Invariants
- A request expires unless its reader repeats it within `REQUEST_TTL_S`, so that a dead reader is in no round.
- The publisher announces as the owner of the run: one that has lost the name raises RunTaken.
- Times are those of Redis. A request from the future, as after a clock was set back, is invalid: its reader repeats it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from redis.exceptions import ResponseError

from services.buffer import Buffer
from services.buffer.connection import Connection
from services.buffer.integrity import damaged, damaged_value
from services.buffer.keys import Keys
from services.buffer.owner import Owner
from services.config.tree import BufferConfig
from services.weights.channel import WeightVersion
from services.weights.rounds import Request, Round

REQUEST_TTL_S = 2.0

_T = TypeVar("_T")


@dataclass(frozen=True)
class TensorMeta:
    """Metadata of one tensor of a version.

    Attributes:
        name: its Hugging Face name.
        dtype: as torch names it, such as `bfloat16`.
        shape: its shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Announcement:
    """A version that is available, and its tensors in the order in which they are sent."""

    version: WeightVersion
    tensors: tuple[TensorMeta, ...]


@dataclass(frozen=True)
class _Posted:
    request: Request
    at: float


_ANNOUNCEMENT = TypeAdapter(Announcement)
_ROUND = TypeAdapter(Round)
_POSTED = TypeAdapter(_Posted)


class Coordination:
    """The coordination keys of one run. Thread-safe. Every call raises RedisUnavailable while Redis is unreachable.

    Args:
        url: address of the run's Redis.
        run: name of the run.
        config: limits and timeouts.
        owner: for the publisher; None for readers.
    """

    def __init__(self, url: str, run: str, config: BufferConfig, owner: Owner | None = None) -> None:
        self._connection = Connection(url, config)
        self._keys = Keys(run)
        self._buffer = Buffer(self._connection, run, config, max_attempts=1, owner=owner)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def announce(self, announcement: Announcement) -> None:
        """Announce the newest version. Raises RunTaken."""
        self._buffer.announce_weights(_ANNOUNCEMENT.dump_json(announcement))

    def clear(self) -> None:
        """Remove the announcement of an earlier publisher, which cannot be sent any more. Raises RunTaken."""
        self._buffer.announce_weights("")

    def announced(self) -> Announcement | None:
        """The newest version, None before the first."""
        reply = self._call("get", "weights_announced")
        return None if reply is None else self._parsed(_ANNOUNCEMENT, "weights_announced", reply)

    def request(self, request: Request) -> None:
        """Make or repeat a request. A reader has at most one."""
        self._call("hset", "weights_wishes", request.reader, _POSTED.dump_json(_Posted(request, self._now())))

    def withdraw(self, *readers: str) -> None:
        """Remove the requests of these readers."""
        if readers:
            self._call("hdel", "weights_wishes", *readers)

    def requests(self) -> list[Request]:
        """The current requests. Expired ones are removed."""
        posted = [self._parsed(_POSTED, "weights_wishes", reply) for reply in self._call("hvals", "weights_wishes")]
        now = self._now()
        current: list[Request] = []
        expired: list[str] = []
        for request, at in ((entry.request, entry.at) for entry in posted):
            if now - REQUEST_TTL_S <= at <= now:
                current.append(request)
            else:
                expired.append(request.reader)
        self.withdraw(*expired)
        return current

    def announce_round(self, round_: Round) -> None:
        """Announce a round to its readers. Raises RunTaken."""
        self._buffer.call_weight_round(_ROUND.dump_json(round_))

    def round(self) -> Round | None:
        """The round announced last."""
        reply = self._call("get", "weights_round")
        return None if reply is None else self._parsed(_ROUND, "weights_round", reply)

    def _now(self) -> float:
        seconds, microseconds = self._connection.call(self._connection.client.time)
        return float(seconds) + float(microseconds) / 1e6

    def _call(self, command: str, key: str, *args: object) -> Any:
        method = getattr(self._connection.client, command)
        try:
            return self._connection.call(lambda: method(self._keys[key], *args))
        except ResponseError as error:
            problem = error
        raise self._connection.call(lambda: damaged(self._connection.client, self._keys, problem)) from problem

    def _parsed(self, kind: TypeAdapter[_T], key: str, reply: bytes) -> _T:
        try:
            return kind.validate_json(reply)
        except ValidationError as error:
            raise damaged_value(self._keys, key, reply) from error
