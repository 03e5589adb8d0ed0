"""Groups that are complete and yet not what this run asked for: counted, said, played again, never trained on."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator

import pytest

from learner.dispatch import Dispatcher
from learner.dynamic_sampling import Collected
from learner.intake import Intake
from learner.prefetch import Prefetcher
from services.buffer import Buffer
from services.buffer.keys import Keys, ticket_field
from services.codec import encode
from services.config.tree import BufferConfig, Config
from services.schemas import TRAIN_STREAM, Ticket, Trajectory
from tests.learner.synthetic import play
from tests.waiting import until

CONFIG = Config.model_validate({"learner": {"updates": 2, "groups_per_update": 2, "group_size": 2, "max_staleness": 0}})
SPLITS = {"train": 5}


@pytest.fixture
def buffer(redis_url: str, run_name: str) -> Iterator[Buffer]:
    buffer = Buffer.connect(redis_url, run_name, BufferConfig())
    yield buffer
    buffer.close()


@pytest.fixture
def dispatcher() -> Dispatcher:
    return Dispatcher(CONFIG, SPLITS)


@pytest.fixture
def intake(buffer: Buffer, dispatcher: Dispatcher) -> Intake:
    return Intake(CONFIG.learner, buffer, dispatcher, Prefetcher(buffer, TRAIN_STREAM))


def play_all(buffer: Buffer) -> None:
    for ticket in buffer.lease("a", 100, 60.0):
        buffer.store(play(ticket, 0, steps=1))


def put(buffer: Buffer, run: str, member: int, document: bytes | None) -> None:
    """In the place of a member of group 0; None: nothing is there."""
    key, field = Keys(run)["trajectories"], ticket_field(TRAIN_STREAM, 0, member)
    buffer._client.hdel(key, field)
    if document is not None:
        buffer._client.hset(key, field, document)


def another(ticket: Ticket, **changes: object) -> bytes:
    return encode(play(ticket.model_copy(update=changes), 0, steps=1))


CASES: dict[str, Callable[[Ticket], bytes | None]] = {
    "it is missing": lambda ticket: None,
    "another member's": lambda ticket: another(ticket, member=0),
    "another group's": lambda ticket: another(ticket, group=7),
    "another stream's": lambda ticket: another(ticket, stream="eval-000000"),
    "of a larger group": lambda ticket: another(ticket, group_size=3),
    "of another task": lambda ticket: another(
        ticket, task=ticket.task.model_copy(update={"index": ticket.task.index + 1})
    ),
    "of another seed": lambda ticket: another(ticket, seed=ticket.seed + 1),
    "of another temperature": lambda ticket: another(ticket, temperature=0.1),
    "without a step": lambda ticket: encode(dataclasses.replace(play(ticket, 0, steps=1), steps=())),
    "no trajectory": lambda ticket: b"foreign",
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_played_again(case, buffer, dispatcher, intake, run_name, caplog):
    caplog.set_level(logging.WARNING)
    collected = Collected()
    assert not intake.poll(0, collected)
    play_all(buffer)
    put(buffer, run_name, 1, CASES[case](dispatcher.tickets([0])[1]))
    assert not intake.poll(0, collected)
    assert (collected.unreadable, list(collected.groups)) == (1, [1])
    assert "group 0 unreadable, issuing it again" in caplog.text
    play_all(buffer)
    assert intake.poll(0, collected)
    assert collected.unreadable == 1
    played: list[list[Trajectory]] = [collected.groups[group] for group in (0, 1)]
    assert [t.ticket for group in played for t in group] == dispatcher.tickets([0, 1])


def test_the_right_ones_are_taken(buffer, dispatcher, intake):
    collected = Collected()
    intake.poll(0, collected)
    play_all(buffer)
    assert intake.poll(0, collected)
    assert collected.unreadable == 0


def test_a_lease_ends_in_its_time_while_no_actor_lives(buffer, intake):
    """The run's clock counts a gap between two calls as a second at most: the learner's own calls keep it going."""
    intake.poll(0, Collected())
    buffer.lease("dead", 100, 0.5)
    assert buffer.stats().queued == 0
    began = time.monotonic()
    until(lambda: intake.poll(0, Collected()) or buffer.stats().leased == 0)
    assert buffer.stats().queued == 4
    assert time.monotonic() - began >= 0.4
