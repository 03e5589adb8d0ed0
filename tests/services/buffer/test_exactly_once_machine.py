"""Dispatcher, intake, prefetcher, buffer and actors together over random histories: deaths at every point, late and
repeated pushes, lost leases, Redis going back or losing everything, its clock set, and learners that lose the run to
another process while they stand still. Every group is trained on at most once in the
history that survives, in order and fresh, and every history can still be brought to its end."""

from __future__ import annotations

import contextlib
import copy
import math
import uuid
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from learner.dispatch import Dispatcher
from learner.dynamic_sampling import Collected
from learner.intake import Intake
from learner.prefetch import Prefetcher
from learner.report import staleness
from services.buffer import Buffer, Stored
from services.config.tree import BufferConfig, Config
from services.errors import RunTaken
from services.redis_server import EmbeddedRedis
from services.schemas import TRAIN_STREAM, Ticket, Trajectory
from tests.learner.synthetic import play
from tests.services.buffer.lost_data import delete_run, restore_run, save_run, set_clock, take_over
from tests.tiers import examples

UPDATES, PER_UPDATE, STALENESS = 4, 2, 1


def settings_of(size: int, partial_groups: str) -> Config:
    learner = {"updates": UPDATES, "groups_per_update": PER_UPDATE, "group_size": size, "max_staleness": STALENESS}
    return Config.model_validate({"learner": learner, "rollout": {"partial_groups": partial_groups}})


WHOLE, PARTIAL = settings_of(2, "replace"), settings_of(3, "keep")
SPLITS = {"train": 5}
ACTORS = st.sampled_from(["a", "b", "c"])


class Learner:
    """The trainer's steps, each of which it may die after."""

    def __init__(self, config: Config, buffer: Buffer) -> None:
        self.config = config
        self.buffer = buffer
        self.version = 0
        self.ledger: list[tuple[int, int]] = []
        self.start(Dispatcher(config, SPLITS))
        self.checkpoint: tuple[int, dict[str, object]] = (0, self.dispatcher.state())

    def start(self, dispatcher: Dispatcher) -> None:
        """A new process, which knows what the dispatcher's state says."""
        self.dispatcher = dispatcher
        self.prefetch = Prefetcher(self.buffer, TRAIN_STREAM)
        self.intake = Intake(self.config.learner, self.buffer, dispatcher, self.prefetch, reread_s=math.inf)

    def issue(self) -> None:
        """Look once, and be stopped before it takes effect."""
        self.intake.poll(self.version, Collected())

    def update(self) -> bool:
        """Train on the window when all of it is there; what is too old goes out again."""
        collected = Collected()
        if self.version == UPDATES or not self.intake.poll(self.version, collected):
            return False
        for number, group in collected.groups.items():
            tickets, played = self.dispatcher.tickets([number]), [t.ticket for t in group]
            assert played == [ticket for ticket in tickets if ticket in played]
            assert len(played) >= (self.config.rollout.fewest_members or len(tickets))
            assert staleness(self.version, group) <= STALENESS
        self.buffer.beat()  # as the trainer does before anything comes of the update
        self.version += 1
        self.dispatcher.settle(list(collected.groups))
        self.ledger += [(self.version, group) for group in collected.groups]
        return True

    def save(self) -> None:
        self.checkpoint = self.version, self.dispatcher.state()

    def acknowledge(self) -> None:
        self.buffer.remove(TRAIN_STREAM, self.dispatcher.finished(self.buffer.known(TRAIN_STREAM)))

    def restart(self) -> None:
        self.version, state = self.checkpoint
        self.start(Dispatcher(self.config, SPLITS))
        self.dispatcher.restore(state)
        self.ledger = [(update, group) for update, group in self.ledger if update <= self.version]
        self.acknowledge()


class Machine(RuleBasedStateMachine):
    def __init__(self, url: str, config: Config = WHOLE) -> None:
        super().__init__()
        self.url, self.run, self.config = url, f"once-{uuid.uuid4().hex}", config
        self.buffer = self.connect()
        take_over(self.buffer)
        self.frozen: Learner | None = None  # has lost the run, and does not know it yet
        self.learner = Learner(config, self.buffer)
        self.announced = 0
        self.held: dict[str, list[Ticket]] = {"a": [], "b": [], "c": []}
        self.pushed: list[Trajectory] = []
        self.saved: dict[str, bytes] = {}
        self.learner.issue()

    def connect(self) -> Buffer:
        fewest = self.config.rollout.fewest_members
        return Buffer.connect(self.url, self.run, BufferConfig(), max_attempts=3 - bool(fewest), fewest_members=fewest)

    def teardown(self) -> None:
        try:
            self.finish()
        finally:
            delete_run(self.buffer)
            self.buffer.close()
            if self.frozen is not None:
                self.frozen.buffer.close()

    def finish(self) -> None:
        """From wherever it is, the run comes to its end."""
        self.held = {actor: [] for actor in self.held}
        for _ in range(8 * UPDATES):
            if self.learner.version == UPDATES:
                break
            self.time_passes()
            self.learner.issue()
            self.end_leases()
            for ticket in self.buffer.lease("last", 100, 600.0):
                self.buffer.store(play(ticket, self.learner.version, steps=1))
            self.learner.update()
        assert self.learner.version == UPDATES
        self.trained_once()
        self.learner.save()
        self.learner.acknowledge()
        assert self.buffer.known(TRAIN_STREAM) == set()

    def end_leases(self) -> None:
        for group in self.buffer.contents():
            for ticket in group.tickets:
                if ticket.holder is not None and ticket.holder != "last":
                    self.buffer.release(ticket.holder, [f"{group.stream}/{group.group}/{ticket.member}"])

    @rule()
    def issue(self) -> None:
        self.learner.issue()

    @rule()
    def time_passes(self) -> None:
        """The learner reads all groups again, as it does every few seconds; until then it knows of no loss."""
        self.learner.intake.read_again()

    @rule()
    def read_ahead(self) -> None:
        self.learner.prefetch._prefetch()

    @rule()
    def update(self) -> None:
        if self.learner.update():
            self.announced = self.learner.version

    @rule()
    def update_unannounced(self) -> None:
        self.learner.update()

    @rule(acknowledged=st.booleans())
    def checkpoint(self, acknowledged: bool) -> None:
        self.learner.save()
        if acknowledged:
            self.learner.acknowledge()

    @rule()
    def restart_learner(self) -> None:
        self.learner.restart()
        self.announced = self.learner.version

    @rule()
    def take_over(self) -> None:
        """Another process resumes the run while this one stands still; the actors of this one are its own."""
        if self.frozen is not None:
            self.frozen.buffer.close()
        self.frozen = copy.copy(self.learner)
        self.frozen.ledger = list(self.learner.ledger)
        self.buffer = self.connect()
        take_over(self.buffer)
        self.learner.buffer = self.buffer
        self.restart_learner()
        self.held = {"a": [], "b": [], "c": []}

    @precondition(lambda self: self.frozen is not None)
    @rule(step=st.sampled_from(["update", "acknowledge", "issue", "push"]))
    def thaw(self, step: str) -> None:
        """The stalled process continues: it trains on nothing and removes nothing."""
        frozen = self.frozen
        assert frozen is not None
        self.buffer.beat()
        before = (len(frozen.ledger), self.buffer.contents())
        with contextlib.suppress(RunTaken):
            match step:
                case "update":
                    frozen.update()
                case "acknowledge":
                    frozen.acknowledge()
                case "issue":
                    frozen.issue()
                case "push":
                    for trajectory in self.pushed[-1:]:
                        frozen.buffer.store(trajectory)
        places = [[t.place for t in group.tickets] for group in before[1]]
        assert (len(frozen.ledger), places) == (
            before[0],
            [[t.place for t in group.tickets] for group in self.buffer.contents()],
        )

    @rule(seconds=st.sampled_from([3600, -3600, 86400 * 365]))
    def set_clock(self, seconds: int) -> None:
        set_clock(self.buffer, seconds)

    @rule(actor=ACTORS, limit=st.integers(1, 6))
    def lease(self, actor: str, limit: int) -> None:
        self.held[actor] += self.buffer.lease(actor, limit, 600.0)

    @precondition(lambda self: any(self.held.values()))
    @rule(actor=ACTORS, late=st.integers(0, 2))
    def push(self, actor: str, late: int) -> None:
        for ticket in self.held[actor]:
            self.pushed.append(play(ticket, max(0, self.announced - late), steps=1))
            self.buffer.store(self.pushed[-1])
        self.held[actor] = []

    @precondition(lambda self: self.pushed)
    @rule(data=st.data())
    def push_again(self, data: st.DataObject) -> None:
        trajectory = data.draw(st.sampled_from(self.pushed))
        stored = self.buffer.store(trajectory)
        if trajectory.ticket.group not in self.buffer.known(TRAIN_STREAM):
            assert stored is Stored.UNKNOWN

    @rule(actor=ACTORS)
    def kill_actor(self, actor: str) -> None:
        self.buffer.renew(actor, [ticket.id for ticket in self.held[actor]], 0.0)
        self.held[actor] = []

    @rule(actor=ACTORS)
    def lose_leases(self, actor: str) -> None:
        """The actor is alive, but another one gets its tickets; it stores late."""
        self.buffer.renew(actor, [ticket.id for ticket in self.held[actor]], 0.0)

    @rule()
    def expire(self) -> None:
        self.buffer.expire()

    @precondition(lambda self: any(self.held.values()))
    @rule(actor=ACTORS)
    def fail(self, actor: str) -> None:
        for ticket in self.held[actor][:1]:
            self.buffer.fail(actor, ticket.id, "for the test")
        self.held[actor] = self.held[actor][1:]

    @rule()
    def save_redis(self) -> None:
        self.saved = save_run(self.buffer)

    @rule(everything=st.booleans())
    def lose_redis(self, everything: bool) -> None:
        restore_run(self.buffer, {} if everything else self.saved)

    @invariant()
    def trained_once(self) -> None:
        groups = [group for _, group in self.learner.ledger]
        assert len(set(groups)) == len(groups)
        updates = [update for update, _ in self.learner.ledger]
        assert updates == [update for update in range(1, self.learner.version + 1) for _ in range(PER_UPDATE)]
        assert len(self.learner.dispatcher.outstanding) <= self.learner.dispatcher.capacity
        assert not self.learner.dispatcher.outstanding & set(groups)


def run(machine: Callable[[], RuleBasedStateMachine], histories: int, steps: int) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine,
        settings=settings(
            max_examples=histories,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_every_group_is_trained_on_once(redis_url: str) -> None:
    run(lambda: Machine(redis_url), examples(1000, short=250), 15)


def test_every_group_is_trained_on_once_also_where_groups_go_on_without_a_member(redis_url: str) -> None:
    run(lambda: Machine(redis_url, PARTIAL), examples(300, short=100), 15)


class RestartMachine(Machine):
    """The same, with a redis-server that is really killed and comes back from its append-only file."""

    def __init__(self, server: EmbeddedRedis) -> None:
        self.server = server
        super().__init__(server.url)

    @rule()
    def kill_redis(self) -> None:
        process = self.server._process
        assert process is not None
        process.kill()
        process.wait()
        assert self.server.ensure_running()


def test_every_group_is_trained_on_once_with_a_redis_that_is_killed(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as server:
        run(lambda: RestartMachine(server), examples(25, short=10), 20)
