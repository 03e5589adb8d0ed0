"""Turns on a shared card: one holder at a time, whatever dies, whatever Redis loses, whatever its clock does."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from services.buffer import Buffer
from services.buffer.card import Bid, Hold, Turn
from services.config.tree import BufferConfig
from tests.services.buffer.lost_data import delete_run, restore_run, save_run, set_clock, take_over
from tests.tiers import examples
from tests.waiting import until

LONG_S = 600.0
HOUR_S = 3600


@pytest.fixture
def buffer(redis_url: str, run_name: str) -> Iterator[Buffer]:
    buffer = Buffer.connect(redis_url, run_name, BufferConfig())
    yield buffer
    delete_run(buffer)
    buffer.close()


def taken(buffer: Buffer, bid: Bid, lease_s: float = LONG_S) -> Turn:
    turn = buffer.card.take(bid, lease_s)
    assert turn is not None
    return turn


def test_one_has_the_card_and_says_what_for(buffer: Buffer) -> None:
    assert buffer.card.state() is None
    turn = taken(buffer, Bid("actor"))
    assert buffer.card.take(Bid("other"), LONG_S) is None
    assert buffer.card.renew(turn, LONG_S, "playing") is Hold.HELD
    state = buffer.card.state()
    assert state is not None
    assert (state.holder, state.phase, state.wanted) == ("actor", "playing", False)
    assert LONG_S - 60 < state.left_s <= LONG_S
    buffer.card.give(turn)
    assert buffer.card.state() is None
    assert taken(buffer, Bid("other")).number > turn.number


def test_the_learner_goes_first_and_the_holder_is_told(buffer: Buffer) -> None:
    playing, learner = taken(buffer, Bid("actor")), Bid("learner", first=True)
    assert buffer.card.take(learner, LONG_S) is None
    assert buffer.card.renew(playing, LONG_S, "playing") is Hold.WANTED
    buffer.card.give(playing)
    assert buffer.card.take(Bid("another actor"), LONG_S) is None
    turn = taken(buffer, learner)
    assert buffer.card.renew(turn, LONG_S, "updating") is Hold.HELD
    buffer.card.give(turn)
    taken(buffer, Bid("another actor"))


def test_a_learner_that_died_waiting_keeps_nobody_waiting(buffer: Buffer) -> None:
    playing = taken(buffer, Bid("actor"))
    buffer.card.take(Bid("learner", first=True), 0.2)
    buffer.card.give(playing)
    until(lambda: buffer.card.take(Bid("actor"), LONG_S) is not None)


def test_a_dead_holder_frees_the_card_and_comes_back_to_nothing(buffer: Buffer) -> None:
    dead = taken(buffer, Bid("dead"), 0.2)
    bid = Bid("learner", first=True)
    until(lambda: buffer.card.take(bid, LONG_S) is not None)
    assert buffer.card.renew(dead, LONG_S, "playing") is Hold.OVER
    buffer.card.give(dead)
    state = buffer.card.state()
    assert state is not None
    assert state.holder == "learner"


def test_a_holder_that_stood_still_goes_on_if_nobody_came(buffer: Buffer) -> None:
    turn = taken(buffer, Bid("actor"), 0.05)
    until(lambda: buffer.card.state() is None)
    assert buffer.card.renew(turn, LONG_S, "playing") is Hold.HELD


def test_a_granted_request_can_be_repeated_and_a_late_renewal_takes_nothing_back(buffer: Buffer) -> None:
    bid = Bid("actor")
    turn = taken(buffer, bid)
    assert taken(buffer, bid) == turn  # the first reply was lost
    buffer.card.give(turn)
    buffer.card.give(turn)
    assert buffer.card.renew(turn, LONG_S, "playing") is Hold.OVER
    assert buffer.card.state() is None


@pytest.mark.parametrize("seconds", [HOUR_S, -HOUR_S])
def test_setting_the_clock_ends_no_turn_and_prolongs_none(buffer: Buffer, seconds: int) -> None:
    live = taken(buffer, Bid("live"), 30.0)
    for step in (seconds, -seconds, seconds):
        set_clock(buffer, step)
        assert buffer.card.take(Bid("other"), LONG_S) is None
        assert buffer.card.renew(live, 30.0, "playing") is Hold.HELD
    buffer.card.give(live)
    taken(buffer, Bid("dead"), 0.3)
    set_clock(buffer, -HOUR_S)
    until(lambda: buffer.card.take(Bid("other"), LONG_S) is not None, seconds=30)


@pytest.mark.parametrize("value", ["", "foreign", "inf", "nan", "-1", "1e300"])
@pytest.mark.parametrize("name", ["number", "ends", "wanted"])
def test_what_no_run_writes_reads_as_a_free_card_or_is_written_again(buffer: Buffer, name: str, value: str) -> None:
    turn = taken(buffer, Bid("actor"), 0.2)
    buffer._client.hset(buffer._keys["card"], name, value)
    assert buffer.card.renew(turn, 0.2, "playing") is Hold.HELD
    until(lambda: buffer.card.take(Bid("other"), LONG_S) is not None)


def test_the_next_owner_of_the_run_finds_the_card_free(buffer: Buffer) -> None:
    take_over(buffer)
    taken(buffer, Bid("learner", first=True))
    take_over(buffer)
    assert buffer.card.state() is None


@dataclass
class Player:
    """One that takes turns, and what it believes."""

    name: str
    first: bool
    bid: Bid | None = None
    turn: Turn | None = None


class Machine(RuleBasedStateMachine):
    """A learner and two actors; Redis goes back to older data, leases end, calls are repeated.

    The model is the list of all granted turns: only the latest may be renewed after its holder has shown it once.
    """

    buffer: Buffer

    @initialize()
    def begin(self) -> None:
        delete_run(self.buffer)
        self.players = [Player("learner", True), Player("a", False), Player("b", False)]
        self.granted: list[int] = []
        self.saved: dict[str, bytes] | None = None
        self.lossless = True

    @rule(who=st.integers(0, 2))
    def take(self, who: int) -> None:
        player = self.players[who]
        if player.turn is not None:
            return
        player.bid = player.bid or Bid(player.name, player.first)
        turn = self.buffer.card.take(player.bid, LONG_S)
        if turn is None:
            return
        assert turn.number not in self.granted
        if self.lossless:
            assert all(turn.number > earlier for earlier in self.granted)
            assert not any(other.turn for other in self.players if self._alive(other))
        assert player.first or not self._learner_waits()
        self.granted.append(turn.number)
        player.turn = turn

    @rule(who=st.integers(0, 2))
    def renew(self, who: int) -> None:
        player = self.players[who]
        if player.turn is None:
            return
        found = self.buffer.card.renew(player.turn, LONG_S, "phase")
        if found is Hold.OVER:
            assert any(number > player.turn.number for number in self.granted)
            player.turn = player.bid = None
            return
        state = self.buffer.card.state()
        assert state is not None
        assert (state.holder, state.wanted) == (player.name, found is Hold.WANTED)
        for other in self.players:  # whoever has an earlier turn finds out when it renews
            if other.turn is not None and other.turn.number < player.turn.number:
                assert self.buffer.card.renew(other.turn, LONG_S, "phase") is Hold.OVER

    @rule(who=st.integers(0, 2))
    def give(self, who: int) -> None:
        player = self.players[who]
        if player.turn is None:
            return
        before, latest = self.buffer.card.state(), self._number()
        self.buffer.card.give(player.turn)
        if latest > player.turn.number:
            after = self.buffer.card.state()
            assert (after and after.holder) == (before and before.holder)
        else:
            assert self.buffer.card.state() is None
        player.turn = player.bid = None

    @rule(who=st.integers(0, 2))
    def die(self, who: int) -> None:
        """It never calls again, and its lease ends; a new one takes its place."""
        old = self.players[who]
        self.players[who] = Player(f"{old.name[0]}-{uuid.uuid4().hex[:4]}", old.first)
        if old.turn is not None and self._number() == old.turn.number:
            self.buffer._client.hset(self.buffer._keys["card"], "ends", 1)
        if old.first:
            self.buffer._client.hdel(self.buffer._keys["card"], "wanted")

    @rule()
    def save(self) -> None:
        self.saved = save_run(self.buffer)

    @rule()
    def lose_data(self) -> None:
        if self.saved is not None:
            restore_run(self.buffer, self.saved)
            self.lossless = False
            began = int(time.time() * 1000)
            until(lambda: int(time.time() * 1000) > began)  # numbers are unique by Redis' clock, which counts in ms

    @rule(step=st.sampled_from([HOUR_S, -HOUR_S]))
    def set_the_clock(self, step: int) -> None:
        set_clock(self.buffer, step)

    @invariant()
    def one_holder(self) -> None:
        if self.lossless:
            assert sum(self._alive(player) for player in self.players) <= 1

    def _number(self) -> int:
        return int(self.buffer._client.hget(self.buffer._keys["card"], "number") or 0)  # type: ignore[arg-type]

    def _alive(self, player: Player) -> bool:
        """Whether the player's turn is the one in Redis and its lease has not ended."""
        state = self.buffer.card.state()
        return player.turn is not None and state is not None and self._number() == player.turn.number

    def _learner_waits(self) -> bool:
        state = self.buffer._client.hget(self.buffer._keys["card"], "wanted")
        return state is not None


def test_no_history_gives_the_card_to_two(redis_url: str) -> None:
    buffer = Buffer.connect(redis_url, f"card-{uuid.uuid4().hex[:8]}", BufferConfig())

    class Here(Machine):
        pass

    Here.buffer = buffer
    try:
        run_state_machine_as_test(  # type: ignore[no-untyped-call]
            Here, settings=settings(max_examples=examples(100, short=40), stateful_step_count=30, deadline=None)
        )
    finally:
        delete_run(buffer)
        buffer.close()
