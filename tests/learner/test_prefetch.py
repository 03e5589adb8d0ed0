"""Groups are read ahead from a real Redis; what was removed meanwhile is not handed out."""

import pytest

from learner import prefetch
from learner.prefetch import Prefetcher
from services.buffer import Buffer
from services.config.tree import BufferConfig
from services.schemas import Task, Ticket
from tests.learner.synthetic import play
from tests.waiting import until


@pytest.fixture
def buffer(redis_url, run_name, monkeypatch):
    monkeypatch.setattr(prefetch, "POLL_S", 0.01)
    buffer = Buffer.connect(redis_url, run_name, BufferConfig())
    yield buffer
    buffer.close()


def complete(buffer, group, version=0):
    task = Task(env="e", split="train", index=0)
    tickets = [Ticket(group=group, member=m, group_size=2, task=task, seed=m) for m in range(2)]
    buffer.issue(tickets)
    for ticket in tickets:
        buffer.store(play(ticket, version))


def until_held(reader, groups):
    until(lambda: set(reader._held) == groups)


def test_wanted_groups_are_there_before_they_are_asked_for(buffer):
    for group in (0, 1, 2):
        complete(buffer, group)
    with Prefetcher(buffer, "train") as reader:
        reader.want([0, 2, 7])
        until_held(reader, {0, 2})
        expected = [t.ticket for t in buffer.read("train", 2)]
        buffer.remove("train", [2])
        assert [t.ticket for t in reader.read(2)] == expected
        with pytest.raises(KeyError):
            reader.read(2)
        assert [t.ticket.group for t in reader.read(1)] == [1, 1]
        complete(buffer, 7)
        until_held(reader, {0, 7})
        reader.want([7])
        assert set(reader._held) == {7}


def test_a_group_that_was_dropped_and_played_again_is_read_again(buffer, monkeypatch):
    complete(buffer, 0, version=1)
    with Prefetcher(buffer, "train") as reader:
        reader.want([0])
        until_held(reader, {0})
        slow = buffer.read
        dropped = []

        def read_slowly(stream, group):
            old = slow(stream, group)
            if not dropped:  # the trainer drops the group while the reader has it in its hands
                dropped.append(group)
                reader.read(0)
                buffer.remove("train", [0])
                complete(buffer, 0, version=2)
            return old

        reader.want([])
        monkeypatch.setattr(buffer, "read", read_slowly)
        reader.want([0])
        until_held(reader, {0})
        assert dropped
        assert {trajectory.oldest_version for trajectory in reader.read(0)} == {2}
