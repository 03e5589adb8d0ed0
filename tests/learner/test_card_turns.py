"""The learner's turns on a shared card, on a real Redis: who has it during each call, and what failures leave."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from learner.card_turns import HOLDER, HeldCard, RanksInTurns, learner_ranks
from learner.rank.group import RankFailed, RankGroup
from services.buffer import Buffer
from services.buffer.card import Bid, Hold
from services.config.tree import Config
from tests.services.buffer.lost_data import delete_run
from tests.waiting import until

LEASE_S = 60.0


@pytest.fixture
def buffer(redis_url: str, run_name: str) -> Iterator[Buffer]:
    buffer = Buffer.connect(redis_url, run_name, Config().buffer)
    yield buffer
    delete_run(buffer)
    buffer.close()


def state(buffer: Buffer) -> tuple[str, str] | None:
    found = buffer.card.state()
    return None if found is None else (found.holder, found.phase)


def test_the_turn_is_renewed_while_the_learner_works(buffer: Buffer) -> None:
    held = HeldCard(buffer.card, 0.5)
    held.take("updating")
    began = time.monotonic()
    while time.monotonic() - began < 1.5:
        assert buffer.card.take(Bid("actor"), LEASE_S) is None
    assert state(buffer) == (HOLDER, "updating")
    held.close()
    assert state(buffer) is None


def test_a_card_that_was_lost_is_taken_again(buffer: Buffer) -> None:
    held = HeldCard(buffer.card, LEASE_S)
    held.take("updating")
    buffer._client.hset(buffer._keys["card"], "ends", 0)  # the process stood still
    other = buffer.card.take(Bid("actor"), LEASE_S)
    assert other is not None
    assert not held.renew("publishing")
    held.give()
    assert state(buffer) == ("actor", "")
    buffer.card.give(other)
    held.take("saving")
    assert state(buffer) == (HOLDER, "saving")
    held.close()


class Calls:
    """What the ranks' processes would be asked, with who has the card; `fails` names a method that a dead rank ends."""

    def __init__(self, buffer: Buffer) -> None:
        self.buffer = buffer
        self.made: list[tuple[str, tuple[str, str] | None]] = []
        self.fails = ""

    def __call__(self, method: str, *args: object) -> list[Any]:
        self.made.append((method, state(self.buffer)))
        if method == self.fails:
            raise RankFailed("a learner rank died")
        return [None]


@pytest.fixture
def calls(buffer: Buffer) -> Calls:
    return Calls(buffer)


@pytest.fixture
def ranks(buffer: Buffer, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> Iterator[RankGroup]:
    monkeypatch.setattr(RankGroup, "_call", lambda self, method, *args: calls(method, *args))
    monkeypatch.setattr(RankGroup, "start", lambda self: calls("start"))
    monkeypatch.setattr(RankGroup, "_kill", lambda self: calls("kill"))
    tree = {"rollout": {"share_gpus": "turns"}, "learner": {"zero_stage": 2}}
    ranks = learner_ranks(Config.model_validate(tree), buffer)
    assert isinstance(ranks, RanksInTurns)
    yield ranks
    ranks._card.close()


def test_ranks_have_the_card_whenever_they_compute_and_never_while_they_rest(
    buffer: Buffer, calls: Calls, ranks: RankGroup
) -> None:
    ranks.start()
    assert state(buffer) is None
    ranks.load(Path("checkpoint"))
    ranks.save(Path("checkpoint"))
    ranks.rest()
    ranks.rest()
    assert state(buffer) is None
    ranks.export(Path("policy"))
    assert calls.made == [
        ("start", (HOLDER, "starting")),
        ("leave_device", (HOLDER, "parking")),
        ("return_to_device", (HOLDER, "reloading")),
        ("load", (HOLDER, "loading")),
        ("save", (HOLDER, "saving")),
        ("leave_device", (HOLDER, "parking")),
        ("return_to_device", (HOLDER, "reloading")),
        ("export", (HOLDER, "saving")),
    ]


@pytest.mark.parametrize("method", ["leave_device", "return_to_device"])
def test_ranks_that_died_are_restarted_with_the_card(
    buffer: Buffer, calls: Calls, ranks: RankGroup, method: str
) -> None:
    ranks.start()
    ranks.load(Path("checkpoint"))
    if method == "return_to_device":
        ranks.rest()
    calls.fails = method
    with pytest.raises(RankFailed):
        ranks.rest() if method == "leave_device" else ranks.save(Path("checkpoint"))
    assert state(buffer) is not None
    calls.made.clear()
    ranks.restart()
    ranks.load(Path("checkpoint"))
    starting = (HOLDER, "starting")
    assert calls.made == [("kill", starting), ("start", starting), ("load", (HOLDER, "loading"))]


def test_ranks_whose_turn_was_lost_leave_the_device_and_wait_for_the_next(
    buffer: Buffer, calls: Calls, ranks: RankGroup
) -> None:
    ranks.start()
    ranks.load(Path("checkpoint"))
    buffer._client.hset(buffer._keys["card"], "ends", 0)
    other = buffer.card.take(Bid("actor"), LEASE_S)
    assert other is not None
    ranks.rest()
    assert calls.made[-1][0] == "leave_device"
    assert buffer.card.renew(other, LEASE_S, "playing") is Hold.HELD


def test_ranks_with_a_device_of_their_own_have_no_turns(buffer: Buffer) -> None:
    ranks = learner_ranks(Config(), buffer)
    assert type(ranks) is RankGroup
    ranks.rest()
    assert until(lambda: state(buffer) is None)
