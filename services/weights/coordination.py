"""Where publisher and readers of a collective channel tell each other what they want: a few small keys in Redis.

Invariants
- A wish that its reader does not repeat for `WISH_TTL_S` is void: who has died is in no round.
- Times are those of Redis. A wish from the future, as after a clock was set, is void too: its reader repeats it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from redis.exceptions import ResponseError

from services.buffer.connection import Connection
from services.buffer.integrity import damaged, damaged_value
from services.buffer.keys import Keys
from services.config.tree import BufferConfig
from services.weights.channel import WeightVersion
from services.weights.rounds import Round, Wish

WISH_TTL_S = 2.0

_T = TypeVar("_T")


@dataclass(frozen=True)
class TensorMeta:
    """Name, dtype (as torch calls it) and shape of one tensor on its way."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Announcement:
    """A version that can be had, and what it consists of, in the order in which it is sent."""

    version: WeightVersion
    tensors: tuple[TensorMeta, ...]


@dataclass(frozen=True)
class _Posted:
    wish: Wish
    at: float


_ANNOUNCEMENT = TypeAdapter(Announcement)
_ROUND = TypeAdapter(Round)
_POSTED = TypeAdapter(_Posted)


class Board:
    """One run's board. Thread-safe. Every call raises RedisUnavailable when Redis stays away."""

    def __init__(self, url: str, run: str, config: BufferConfig) -> None:
        self._connection = Connection(url, config)
        self._keys = Keys(run)

    def close(self) -> None:
        self._connection.close()

    def announce(self, announcement: Announcement) -> None:
        self._call("set", "weights_announced", _ANNOUNCEMENT.dump_json(announcement))

    def clear(self) -> None:
        """Forget what an earlier publisher announced: nobody can send it any more."""
        self._call("delete", "weights_announced")

    def announced(self) -> Announcement | None:
        answer = self._call("get", "weights_announced")
        return None if answer is None else self._parsed(_ANNOUNCEMENT, "weights_announced", answer)

    def wish(self, wish: Wish) -> None:
        """Say it, or say it again."""
        self._call("hset", "weights_wishes", wish.reader, _POSTED.dump_json(_Posted(wish, self._now())))

    def withdraw(self, *readers: str) -> None:
        if readers:
            self._call("hdel", "weights_wishes", *readers)

    def wishes(self) -> list[Wish]:
        """The wishes that hold; void ones are cleared away."""
        posted = [self._parsed(_POSTED, "weights_wishes", answer) for answer in self._call("hvals", "weights_wishes")]
        now = self._now()
        held = [entry.wish for entry in posted if now - WISH_TTL_S <= entry.at <= now]
        self.withdraw(*(entry.wish.reader for entry in posted if entry.wish not in held))
        return held

    def call_round(self, round_: Round) -> None:
        """Call the readers of a round together."""
        self._call("set", "weights_round", _ROUND.dump_json(round_))

    def round(self) -> Round | None:
        """The round called last."""
        answer = self._call("get", "weights_round")
        return None if answer is None else self._parsed(_ROUND, "weights_round", answer)

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

    def _parsed(self, kind: TypeAdapter[_T], key: str, answer: bytes) -> _T:
        try:
            return kind.validate_json(answer)
        except ValidationError as error:
            raise damaged_value(self._keys, key, answer) from error
