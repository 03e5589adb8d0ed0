"""Keys of episodes: one for each attempt, and the key *is* the episode.

Invariants
- A key is 32 random bytes. Only its digest is kept, so neither memory dumps of the table nor logs contain keys.
- A key is void as soon as its episode ends, for whatever reason; `VOIDED` voided ones are remembered with the reason.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import OrderedDict
from typing import Generic, TypeVar

from actors.gateway.errors import Refused

PREFIX = "anc_"
KEY_BYTES = 32
VOIDED = 4096

T = TypeVar("T")


class Keys(Generic[T]):
    """The keys of the episodes that are being played."""

    def __init__(self) -> None:
        self._live: dict[bytes, T] = {}
        self._void: OrderedDict[bytes, Refused] = OrderedDict()

    def __len__(self) -> int:
        return len(self._live)

    def issue(self, episode: T) -> str:
        """A new key of an episode."""
        key = PREFIX + secrets.token_urlsafe(KEY_BYTES)
        self._live[_digest(key)] = episode
        return key

    def find(self, key: str | None) -> T:
        """The episode of a key. Raises Refused: no key, an unknown one, or one whose episode has ended."""
        if not key:
            raise Refused(401, "invalid_api_key", "missing key: send the episode's key as a bearer token")
        digest = _digest(key)
        episode = self._live.get(digest)
        if episode is None:
            raise self._void.get(digest) or Refused(401, "invalid_api_key", "unknown key: it is no key of an episode")
        return episode

    def void(self, key: str, reason: Refused) -> None:
        """Make a key invalid; later requests get `reason`. Idempotent, the first reason wins."""
        digest = _digest(key)
        if self._live.pop(digest, None) is None:
            return
        self._void[digest] = reason
        if len(self._void) > VOIDED:
            self._void.popitem(last=False)


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode(errors="replace"), digest_size=16).digest()
