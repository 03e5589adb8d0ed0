"""Who has the card, where learner and actors take turns on it (`rollout.share_gpus: turns`): a lease in Redis.

Invariants
- At most one turn is under way. Its holder renews it; a holder that is silent for its lease, by the run's own clock,
  loses it, so a dead one frees the card.
- Later turns have higher numbers. Renewing or giving back an earlier turn changes nothing.
- Who goes first (the learner) gets the card next if it has asked: the holder learns it with its next renewal.
- If Redis loses data, the latest turn is written again by its holder.
"""

from __future__ import annotations

import enum
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any


class Hold(enum.Enum):
    """What a renewal finds.

    Attributes:
        OVER: a later turn has begun: the holder must not use the card.
        HELD: the turn goes on.
        WANTED: likewise, and another one waits for the card.
    """

    OVER = 0
    HELD = 1
    WANTED = 2


@dataclass(frozen=True, slots=True)
class Bid:
    """A request for the card. It may be repeated until it is granted.

    Attributes:
        holder: who asks.
        first: whether it goes before others that ask.
        id: unique.
    """

    holder: str
    first: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True, slots=True)
class Turn:
    """A granted request; `number` grows from turn to turn."""

    bid: Bid
    number: int


@dataclass(frozen=True, slots=True)
class CardState:
    """Who has the card.

    Attributes:
        holder: who.
        phase: what for, in its own words.
        left_s: until its lease ends, in seconds.
        wanted: whether another one waits for it.
    """

    holder: str
    phase: str
    left_s: float
    wanted: bool


class Card:
    """The card of one run, from `Buffer.card`. Methods raise what the buffer's methods raise."""

    def __init__(self, run: Callable[..., Any], parsing: Callable[[], AbstractContextManager[None]]) -> None:
        """`run` executes a script; its reply is parsed within `parsing`."""
        self._run = run
        self._parsing = parsing

    def take(self, bid: Bid, lease_s: float) -> Turn | None:
        """Take the card for `lease_s` seconds; None while another one has it or goes first."""
        number = self._run("card_take", bid.holder, bid.id, _milliseconds(lease_s), "1" if bid.first else "")
        return None if number is None else Turn(bid, int(number))

    def renew(self, turn: Turn, lease_s: float, phase: str) -> Hold:
        """Extend a turn to `lease_s` seconds from now, and say what it is used for."""
        bid = turn.bid
        return Hold(int(self._run("card_renew", turn.number, bid.holder, bid.id, _milliseconds(lease_s), phase)))

    def give(self, turn: Turn) -> None:
        """Free the card; no-op if the turn is over."""
        self._run("card_give", turn.number)

    def state(self) -> CardState | None:
        """Who has the card; None if it is free."""
        reply = self._run("card")
        if reply is None:
            return None
        with self._parsing():
            holder, phase, left_ms, wanted = reply
            return CardState(holder.decode(), phase.decode(), left_ms / 1000, bool(wanted))


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))
