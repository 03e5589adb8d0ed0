"""The buffer against a model of it in plain Python, over random histories: lost data, steps of the clock and processes
that take the run over included."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from services.buffer import FROM_THE_START, Buffer, Closed, Stored, StreamStats
from services.config.tree import BufferConfig
from services.errors import RunTaken
from services.schemas import Task, Ticket, Trajectory
from tests.services.buffer.lost_data import delete_run, restore_run, save_run, set_clock, take_over
from tests.tiers import examples

MAX_ATTEMPTS = 2
SIZE = {0: 1, 1: 2, 2: 3}
STREAMS = st.sampled_from(["train", "eval-1", "eval-2"])
GROUPS = st.sampled_from(sorted(SIZE))
ACTORS = st.sampled_from(["a", "b"])
STEPS = st.sampled_from([3600, -3600, 10, -10, 86400 * 365, -86400 * 365])
GroupKey = tuple[str, int]


@dataclass
class Group:
    members: dict[int, str] = field(default_factory=dict)  # "queued", the actor, or "stored" by issued member
    attempts: dict[int, int] = field(default_factory=dict)
    writer: dict[int, str] = field(default_factory=dict)
    cancelled: bool = False
    complete: bool = False
    begun: bool = False  # since its first lease or trajectory


def make(stream: str, group: int, member: int) -> Ticket:
    task = Task(env="e", split="s", index=group)
    return Ticket(stream=stream, group=group, member=member, group_size=SIZE[group], task=task, seed=member)


class Machine(RuleBasedStateMachine):
    def __init__(self, url: str) -> None:
        super().__init__()
        self.url, self.run = url, f"machine-{uuid.uuid4().hex}"
        self.buffer = self.connect()
        take_over(self.buffer)
        self.before: Buffer | None = None  # of the process that had the run before
        self.model: dict[GroupKey, Group] = {}
        self.news: dict[str, object] = {}  # stream -> its last completion or cancellation
        self.told: dict[str, object] = {}  # stream -> sequence of the last `wait` that returned True
        self.saved: tuple[dict[GroupKey, Group], dict[str, object], dict[str, bytes]] = ({}, {}, {})

    def connect(self) -> Buffer:
        return Buffer.connect(self.url, self.run, BufferConfig(), max_attempts=MAX_ATTEMPTS)

    def teardown(self) -> None:
        delete_run(self.buffer)
        self.buffer.close()
        if self.before is not None:
            self.before.close()

    def held(self, actors: str) -> list[Ticket]:
        return [
            make(*key, member)
            for key, group in sorted(self.model.items())
            for member, state in sorted(group.members.items())
            if state in actors
        ]

    def holder(self, ticket: Ticket) -> str:
        return self.model[ticket.stream, ticket.group].members[ticket.member]

    def queued(self) -> list[Ticket]:
        tickets = [make(*key, m) for key, g in self.model.items() for m, s in g.members.items() if s == "queued"]
        return sorted(tickets, key=lambda t: (t.stream == "train", t.stream, t.group, t.member))

    def end(self, key: GroupKey) -> None:
        self.model[key] = Group(cancelled=True)
        self.news[key[0]] = object()

    def attempt(self, ticket: Ticket) -> None:
        key = (ticket.stream, ticket.group)
        group = self.model[key]
        group.attempts[ticket.member] = group.attempts.get(ticket.member, 0) + 1
        group.members[ticket.member] = "queued"
        if group.attempts[ticket.member] == MAX_ATTEMPTS:
            self.end(key)

    @initialize(streams=st.sets(STREAMS))
    def begin(self, streams: set[str]) -> None:
        for stream in sorted(streams):
            for group in sorted(SIZE):
                self.issue(stream, group, 0)

    @rule(stream=STREAMS, group=GROUPS, first=st.integers(0, 2))
    def issue(self, stream: str, group: int, first: int) -> None:
        tickets = [make(stream, group, member) for member in range(min(first, SIZE[group] - 1), SIZE[group])]
        known = self.model.setdefault((stream, group), Group())
        new = [] if known.cancelled or known.complete else [t for t in tickets if t.member not in known.members]
        assert self.buffer.issue(tickets) == len(new)
        known.members.update({t.member: "queued" for t in new})

    @rule(actor=ACTORS, limit=st.integers(1, 4))
    def lease(self, actor: str, limit: int) -> None:
        self.leased(actor, self.queued()[:limit], self.buffer.lease(actor, limit, 600.0))

    @rule(actor=ACTORS, limit=st.integers(1, 4))
    def lease_above_the_cap(self, actor: str, limit: int) -> None:
        last = max(
            (number for (stream, number), g in self.model.items() if stream == "train" and g.complete), default=-1
        )
        awaited = [
            t for t in self.queued() if t.stream != "train" or self.model["train", t.group].begun or t.group < last
        ]
        cap, self.buffer._cap_bytes = self.buffer._cap_bytes, -1
        found = self.buffer.lease(actor, limit, 600.0)
        self.buffer._cap_bytes = cap
        self.leased(actor, awaited[:limit], found)

    def leased(self, actor: str, expected: list[Ticket], found: list[Ticket]) -> None:
        assert found == expected
        for ticket in expected:
            group = self.model[ticket.stream, ticket.group]
            group.members[ticket.member], group.begun = actor, True

    @rule(stream=STREAMS, group=GROUPS, member=st.integers(0, 2), actor=ACTORS)
    def store(self, stream: str, group: int, member: int, actor: str) -> None:
        member = min(member, SIZE[group] - 1)
        known = self.model.get((stream, group), Group())
        if member in known.writer:
            expected = Stored.DUPLICATE
        elif member not in known.members:
            expected = Stored.UNKNOWN
        else:
            known.members[member], known.begun = "stored", True
            known.writer[member] = actor
            known.complete = len(known.writer) == SIZE[group]
            expected = Stored.COMPLETED if known.complete else Stored.STORED
            if known.complete:
                self.news[stream] = object()
        assert self.buffer.store(Trajectory(make(stream, group, member), (), actor=actor)) is expected

    @precondition(lambda self: self.held("ab"))
    @rule(actor=ACTORS, data=st.data())
    def fail(self, actor: str, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.held("ab")))
        if self.holder(ticket) == actor:
            self.attempt(ticket)
        cancelled = self.buffer.fail(actor, ticket.id, "failed")
        assert cancelled == self.model[ticket.stream, ticket.group].cancelled

    @precondition(lambda self: self.held("ab"))
    @rule(actor=ACTORS, data=st.data())
    def release(self, actor: str, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.held("ab")))
        self.buffer.release(actor, [ticket.id])
        if self.holder(ticket) == actor:
            self.model[ticket.stream, ticket.group].members[ticket.member] = "queued"

    @precondition(lambda self: self.held("ab"))
    @rule(data=st.data())
    def expire(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.held("ab")))
        assert self.buffer.renew(self.holder(ticket), [ticket.id], 0.0) == []
        assert self.buffer.expire() == 1
        self.attempt(ticket)

    @rule(actor=ACTORS, stream=STREAMS, group=GROUPS)
    def renew(self, actor: str, stream: str, group: int) -> None:
        ids = [make(stream, group, member).id for member in range(SIZE[group])]
        mine = {ticket.id for ticket in self.held(actor)}
        assert self.buffer.renew(actor, ids, 600.0) == [i for i in ids if i not in mine]
        assert self.buffer.expire() == 0

    @rule(stream=STREAMS, group=GROUPS)
    def cancel(self, stream: str, group: int) -> None:
        self.buffer.cancel(stream, group, "cancelled")
        if (stream, group) in self.model and not self.model[stream, group].cancelled:
            self.end((stream, group))

    @rule(stream=STREAMS, groups=st.lists(GROUPS, max_size=2))
    def remove(self, stream: str, groups: list[int]) -> None:
        self.buffer.remove(stream, groups)
        for group in groups:
            self.model.pop((stream, group), None)
        if groups and not any(name == stream for name, _ in self.model):
            self.news.pop(stream, None)

    @rule(stream=STREAMS)
    def wait(self, stream: str) -> None:
        news = stream in self.news and self.told.get(stream) is not self.news[stream]
        assert self.buffer.wait(stream, 0.0) == news
        if news:
            self.told[stream] = self.news[stream]

    @rule()
    def save(self) -> None:
        """What Redis has on its disk from now on."""
        self.saved = copy.deepcopy(self.model), dict(self.news), save_run(self.buffer)

    @rule()
    def lose(self) -> None:
        """Redis dies and comes back with what it had on its disk, which may be nothing."""
        self.model, self.news = copy.deepcopy(self.saved[0]), dict(self.saved[1])
        restore_run(self.buffer, self.saved[2])

    @rule()
    def mend(self) -> None:
        """Of a group that was issued in part, tickets are in no place: it is removed, and nothing else is."""
        torn = [
            key
            for key, group in self.model.items()
            if not group.complete and not group.cancelled and len(group.members) < SIZE[key[1]]
        ]
        assert self.buffer.mend() == sorted(torn)
        for key in torn:
            del self.model[key]

    @rule(seconds=STEPS)
    def set_clock(self, seconds: int) -> None:
        """No live lease may end by it, and none may be kept: `expire` and `renew` check both."""
        set_clock(self.buffer, seconds)

    @rule()
    def take_over(self) -> None:
        """Another process takes the run: what the actors of the one before hold is free, no attempt counted."""
        if self.before is not None:
            self.before.close()
        self.before, self.buffer = self.buffer, self.connect()
        take_over(self.buffer)
        self.told = {}  # `wait` returns True for everything again
        for group in self.model.values():
            group.members = {m: "queued" if state in ("a", "b") else state for m, state in group.members.items()}

    @precondition(lambda self: self.before is not None)
    @rule(stream=STREAMS, group=GROUPS, actor=ACTORS, number=st.integers(0, 8))
    def write_as_before(self, stream: str, group: int, actor: str, number: int) -> None:
        """A process that lost the run, or an actor of it, continues: its calls change nothing."""
        before, ticket = self.before, make(stream, group, 0)
        assert before is not None
        calls: list[Callable[[], object]] = [
            lambda: before.issue([ticket]),
            lambda: before.lease(actor, 2, 600.0),
            lambda: before.store(Trajectory(ticket, ())),
            lambda: before.fail(actor, ticket.id, "failed"),
            lambda: before.release(actor, [ticket.id]),
            lambda: before.renew(actor, [ticket.id], 0.0),
            before.expire,
            lambda: before.cancel(stream, group, "cancelled"),
            lambda: before.remove(stream, [group]),
        ]
        with pytest.raises(RunTaken):
            calls[number]()

    @invariant()
    def agrees(self) -> None:
        seen = {(found.stream, found.group): found for found in self.buffer.contents()}
        assert list(seen) == sorted(self.model, key=lambda key: (key[0] == "train", *key))
        for key, group in self.model.items():
            found = seen[key]
            assert (found.state == "complete", found.state == "cancelled") == (group.complete, group.cancelled)
            assert (found.reason is not None) == group.cancelled
            names = {"waiting": "queued", "stored": "stored"}
            assert {t.member: t.holder or names[t.place] for t in found.tickets} == group.members
            tried = {t.member: t.attempts for t in found.tickets if t.attempts}
            waiting = {m: n for m, n in group.attempts.items() if group.members.get(m) != "stored"}
            assert tried == waiting

    @rule()
    def counts(self) -> None:
        stats = self.buffer.stats()
        states = [state for group in self.model.values() for state in group.members.values()]
        assert stats.queued == states.count("queued")
        assert stats.leased == states.count("a") + states.count("b")
        assert (stats.trajectory_bytes > 0) == ("stored" in states)
        for stream in {name for name, _ in self.model} | set(stats.streams):
            groups = {number: group for (name, number), group in sorted(self.model.items()) if name == stream}
            assert self.buffer.known(stream) == set(groups)
            assert self.buffer.complete(stream) == [n for n, g in groups.items() if g.complete]
            assert list(self.buffer.cancelled(stream)) == [n for n, g in groups.items() if g.cancelled]
            assert self.buffer.cancelled(stream, 0) == {}
            assert self.buffer.complete(stream, 1) == self.buffer.complete(stream)[:1]
            closed = self.buffer.closed(stream, FROM_THE_START)
            assert sorted(closed.complete) == self.buffer.complete(stream)
            assert dict(sorted(closed.cancelled.items())) == self.buffer.cancelled(stream)
            assert self.buffer.closed(stream, closed.upto) == Closed(closed.upto, [], {})
            complete, cancelled = len(closed.complete), len(closed.cancelled)
            counted = stats.streams.get(stream, StreamStats())
            assert counted == StreamStats(len(groups) - complete - cancelled, complete, cancelled)
        leases, total = self.buffer.leases(100)
        assert total == len(leases) == stats.leased
        assert {(one.stream, one.group, one.member, one.holder) for one in leases} == {
            (t.stream, t.group, t.member, self.holder(t)) for t in self.held("ab")
        }

    @rule(stream=STREAMS, group=GROUPS)
    def read(self, stream: str, group: int) -> None:
        known = self.model.get((stream, group), Group())
        if not known.complete:
            with pytest.raises(KeyError):
                self.buffer.read(stream, group)
            return
        trajectories = self.buffer.read(stream, group)
        assert [t.ticket for t in trajectories] == [make(stream, group, m) for m in range(SIZE[group])]
        assert [t.actor for t in trajectories] == [known.writer[m] for m in range(SIZE[group])]


def test_agrees_with_the_model(redis_url: str) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        lambda: Machine(redis_url),
        settings=settings(
            max_examples=examples(1000, short=250),
            stateful_step_count=15,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
