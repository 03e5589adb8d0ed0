"""Keys of which every value is a run's, and which do not fit together: a flipped byte in an append-only file."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from redis import Redis

from services.buffer import FROM_THE_START, Buffer
from services.buffer.keys import KINDS, Keys, ticket_field
from services.config.tree import BufferConfig
from services.schemas import Task, Ticket, Trajectory
from tests.services.buffer.lost_data import delete_run, restore_run, save_run, take_over

SIZE, GROUPS = 3, 4
TICKET_KEYS = ("queue", "tickets", "trajectories", "given_up", "attempts")
GROUP_KEYS = ("sizes", "counts", "complete", "reasons", "closed")


def group(number: int) -> list[Ticket]:
    task = Task(env="e", split="s", index=0)
    return [Ticket(group=number, member=member, group_size=SIZE, task=task, seed=member) for member in range(SIZE)]


@pytest.fixture
def buffer(redis_url: str, run_name: str) -> Iterator[Buffer]:
    """Group 0 is complete, 1 has a stored, a given up and a waiting ticket, 2 waits, 3 is cancelled."""
    buffer = Buffer.connect(redis_url, run_name, BufferConfig(), max_attempts=2, fewest_members=1)
    take_over(buffer)
    buffer.issue([ticket for number in range(GROUPS) for ticket in group(number)])
    for ticket in buffer.lease("a", SIZE + 1, 600.0):
        buffer.store(Trajectory(ticket, ()))
    for _ in range(2):
        buffer.lease("a", 1, 600.0)
        buffer.fail("a", group(1)[1].id, "why")
    buffer.lease("a", 1, 600.0)
    buffer.fail("a", group(1)[2].id, "why")
    buffer.cancel("train", 3, "why")
    yield buffer
    delete_run(buffer)
    buffer.close()


def flip(client: Redis, key: str, kind: str, field: bytes, other: bytes) -> None:
    """The entry is under another name."""
    if kind == "zset":
        client.zrem(key, field)
        client.zadd(key, {other: 0})
    else:
        value = client.hget(key, field)
        client.hdel(key, field)
        client.hset(key, other, value)  # type: ignore[arg-type]


def flips(field: bytes) -> Iterator[bytes]:
    """A digit of the group or of the member is another one."""
    yield from (field[:-1] + digit for digit in (b"0", b"2", b"9") if not field.endswith(digit))
    place = len(b"1 train 00000000000")
    yield from (field[:place] + digit + field[place + 1 :] for digit in (b"0", b"2", b"3", b"9"))


def play_on(buffer: Buffer) -> None:
    """As a resumed run does: issue what Redis does not know, play until all has ended."""
    for _ in range(3):
        missing = set(range(GROUPS)) - buffer.known("train")
        buffer.issue([ticket for number in sorted(missing) for ticket in group(number)])
        for ticket in buffer.lease("a", 100, 600.0):
            buffer.store(Trajectory(ticket, ()))


@pytest.mark.parametrize("name", TICKET_KEYS + GROUP_KEYS)
def test_every_group_ends_whatever_name_an_entry_has_become(buffer: Buffer, run_name: str, name: str) -> None:
    client, key, saved = buffer._client, Keys(run_name)[name], save_run(buffer)
    fields: list[bytes] = client.zrange(key, 0, -1) if KINDS[name] == "zset" else client.hkeys(key)  # type: ignore
    assert fields
    for field in fields:
        for other in flips(field):
            restore_run(buffer, saved)
            flip(client, key, KINDS[name], field, other)
            buffer.check()
            buffer.mend()
            play_on(buffer)
            ended = {*buffer.complete("train"), *buffer.cancelled("train")}
            assert set(range(GROUPS)) <= ended, (field, other)
            stats = buffer.stats()
            assert (stats.queued, stats.leased) == (0, 0), (field, other)
            assert buffer.mend() == []


DAMAGE: dict[str, Callable[[Redis, Keys, str], object]] = {
    "in no place": lambda client, keys, ticket: client.zrem(keys["queue"], ticket),
    "in two places": lambda client, keys, ticket: client.hset(keys["trajectories"], ticket, "x"),
    "not known": lambda client, keys, ticket: client.hdel(keys["tickets"], ticket),
    "another's": lambda client, keys, ticket: client.hset(keys["tickets"], ticket, group(1)[0].model_dump_json()),
    "held without an end": lambda client, keys, ticket: client.hset(keys["holders"], ticket, "a"),
    "a wrong count": lambda client, keys, ticket: client.hset(keys["counts"], ticket[:-7], "2"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_the_group_is_removed_and_no_other(buffer: Buffer, run_name: str, case: str) -> None:
    before = buffer.contents()
    DAMAGE[case](buffer._client, Keys(run_name), ticket_field("train", 2, 0))
    assert buffer.mend() == [("train", 2)]
    assert buffer.contents() == [found for found in before if found.group != 2]
    assert buffer.issue(group(2)) == SIZE


def test_groups_are_counted_again_and_those_that_are_closed_listed_again(buffer: Buffer, run_name: str) -> None:
    """Also what an earlier release has left, which neither counted nor listed them."""
    right, closed = buffer.stats(), buffer.closed("train", FROM_THE_START)
    keys = Keys(run_name)
    for damage in (
        lambda: buffer._client.delete(keys["group_counts"], keys["closed"], keys["begun"]),
        lambda: buffer._client.hset(keys["group_counts"], mapping={"train known": 7, "eval complete": 1}),
    ):
        damage()
        assert buffer.mend() == []
        assert buffer.stats() == right
        again = buffer.closed("train", FROM_THE_START)
        assert (sorted(again.complete), again.cancelled) == (closed.complete, closed.cancelled)
    assert buffer._client.get(keys["begun"]) == b"1 train 000000000001"


@pytest.mark.parametrize("value", ["-5", "999999999999999"])
def test_stored_bytes_are_counted_again(buffer: Buffer, run_name: str, value: str) -> None:
    right = buffer.stats().trajectory_bytes
    buffer._client.set(Keys(run_name)["bytes"], value)
    assert buffer.mend() == []
    assert buffer.stats().trajectory_bytes == right > 0
