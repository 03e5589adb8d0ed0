"""Messages between an actor and its engine's process: msgpack arrays over a pair of sockets.

The first member of a message is its kind.

    actor to process   start, generate, drop, load, receive, sleep, stop
    process to actor   done or failed, one for each start, load, receive and sleep, in their order;
                       responses (finished ones and statistics), refused (one request), broken (the engine)

Example: two requests, and a weight update in between.

    actor     ["start", model, rollout, 0, 30]   ["generate", 0, [5, 9], 1.0, 24, 77, []]   ["generate", 1, ...]
    process   ["done", stats]
    actor     ["load", 8, {"memory": ...}]
    process   ["responses", [[1, [4, 2], [-0.1, -0.2], [[7, 2]], true, null]], stats]
    process   ["done", stats]
    process   ["responses", [[0, [91, 407, 2], [...], [[7, 1], [8, 2]], true, null]], stats]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgpack


class Request(NamedTuple):
    """A response to sample.

    Attributes:
        id: chosen by the actor, unique for the engine.
        prompt_ids: token ids of the prompt.
        temperature: of sampling.
        max_tokens: longest response.
        seed: of sampling.
        stop: texts that end the response once it contains one of them.
    """

    id: int
    prompt_ids: list[int]
    temperature: float
    max_tokens: int
    seed: int
    stop: Sequence[str] = ()


class Response(NamedTuple):
    """A sampled response: an `actors.engine.interface.Sample` without its text.

    Attributes:
        id: of the request.
        token_ids: the sampled tokens.
        logprobs: their log-probabilities (nats).
        versions: (version, tokens) pairs.
        finished: whether the response ended by itself.
        stopped_by: the text of `stop` that ended it, or the stop token other than end-of-sequence; else None.
    """

    id: int
    token_ids: list[int]
    logprobs: list[float]
    versions: list[tuple[int, int]]
    finished: bool
    stopped_by: int | str | None = None


def pack(kind: str, *members: object) -> bytes:
    """Encode a message; its members are plain data."""
    packed: bytes = msgpack.packb((kind, *members))
    return packed


class Messages:
    """Decodes a stream of messages from pieces of any size."""

    def __init__(self) -> None:
        self._unpacker = msgpack.Unpacker()

    def of(self, data: bytes) -> list[list[Any]]:
        """Return the messages that these bytes complete; the first member of each is its kind."""
        self._unpacker.feed(data)
        return list(self._unpacker)
