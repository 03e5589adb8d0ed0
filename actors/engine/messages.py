"""What an actor and the process of its engine say to each other: msgpack arrays over a pair of sockets.

The first member of a message is its kind. The actor says `start`, `generate`, `drop`, `load`, `receive` and `stop`; the
process `done` or `failed` for each `start`, `load` and `receive`, in their order, `answers`, `refused` and `broken`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgpack


class Request(NamedTuple):
    """A response to be sampled; `id` is its asker's."""

    id: int
    prompt_ids: list[int]
    temperature: float
    max_tokens: int
    seed: int


class Answer(NamedTuple):
    """What was sampled: an `actors.engine.interface.Sample` without its text; `versions`: (version, tokens) pairs."""

    id: int
    token_ids: list[int]
    logprobs: list[float]
    versions: list[tuple[int, int]]
    finished: bool


def pack(kind: str, *members: object) -> bytes:
    """A message as bytes; its members are plain data."""
    packed: bytes = msgpack.packb((kind, *members))
    return packed


class Messages:
    """Takes bytes as they come and gives the messages that are whole."""

    def __init__(self) -> None:
        self._unpacker = msgpack.Unpacker()

    def of(self, data: bytes) -> list[list[Any]]:
        """The messages that these bytes complete; the first member of each is its kind."""
        self._unpacker.feed(data)
        return list(self._unpacker)
