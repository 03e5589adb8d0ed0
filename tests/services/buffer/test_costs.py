"""What an operation costs Redis, counted in commands and bytes: it grows with its own work, not with the run's size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from redis import Redis

from learner.dispatch import Dispatcher
from learner.dynamic_sampling import Collected
from learner.intake import Intake
from learner.prefetch import Prefetcher
from services.buffer import FROM_THE_START, Buffer
from services.config.tree import BufferConfig, Config
from services.redis_server import EmbeddedRedis
from services.schemas import TRAIN_STREAM, Task, Ticket, Trajectory
from tests.learner.synthetic import play
from tests.services.buffer.lost_data import delete_run

TASK = Task(env="e", split="s", index=0)
LONG_S = 600.0
NOISE_BYTES = 1500
"""The replies of INFO, with which the bytes are read, vary by some hundred."""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Redis that nobody else uses, since it counts everybody's commands."""
    with EmbeddedRedis(tmp_path_factory.mktemp("redis")) as server:
        yield server.url


@pytest.fixture
def buffer(url: str, run_name: str) -> Iterator[Buffer]:
    buffer = Buffer.connect(url, run_name, BufferConfig(), max_attempts=9)
    yield buffer
    delete_run(buffer)
    buffer.close()


class Cost:
    """Commands of a call, those inside scripts included, and bytes that Redis sent for it."""

    def __init__(self, buffer: Buffer, call: Callable[[], object]) -> None:
        client: Redis = buffer._client
        call()  # the script is loaded, the clock read
        commands, sent = self._read(client)
        self.result = call()
        after, sent_after = self._read(client)
        self.by_name = {name: count - commands.get(name, 0) for name, count in after.items()}
        self.commands = sum(self.by_name.values())
        self.bytes = sent_after - sent

    @staticmethod
    def _read(client: Redis) -> tuple[dict[str, int], int]:
        sent = client.info("stats")["total_net_output_bytes"]  # type: ignore[index]
        found: dict[str, Any] = client.info("commandstats")  # type: ignore[assignment]
        skipped = ("cmdstat_info", "cmdstat_hset")  # the run's clock is written once in a tenth of a second
        return {name: stats["calls"] for name, stats in found.items() if name not in skipped}, sent


def group(number: int, size: int = 1, stream: str = TRAIN_STREAM) -> list[Ticket]:
    return [
        Ticket(stream=stream, group=number, member=member, group_size=size, task=TASK, seed=0) for member in range(size)
    ]


def issue(buffer: Buffer, groups: range, size: int = 1) -> None:
    buffer.issue([ticket for number in groups for ticket in group(number, size)])


def costs(buffer: Buffer, sizes: tuple[int, int], grow: Callable[[int], object], call: Callable[[], object]) -> None:
    """`call` costs the same at both sizes."""
    small, large = [], []
    for size, found in zip(sizes, (small, large), strict=True):
        grow(size)
        found.append(Cost(buffer, call))
    assert large[0].commands == small[0].commands, (small[0].by_name, large[0].by_name)
    assert large[0].bytes <= small[0].bytes + NOISE_BYTES


def test_counting_does_not_list_the_groups(buffer: Buffer) -> None:
    def grow(groups: int) -> None:
        issue(buffer, range(groups))
        for number in range(0, groups, 2):
            buffer.store(Trajectory(group(number)[0], ()))

    costs(buffer, (20, 600), grow, lambda: (buffer.stats(), buffer.full()))
    assert buffer.stats().streams["train"].complete == 300


def test_a_trajectory_costs_the_same_in_a_large_group_and_among_many(buffer: Buffer) -> None:
    stored = iter(range(10_000))

    def store_next(size: int, number: int) -> Callable[[], object]:
        return lambda: buffer.store(Trajectory(group(number, size)[next(stored) % size], ()))

    issue(buffer, range(1), size=16)
    small = Cost(buffer, store_next(16, 0))
    issue(buffer, range(1, 2), size=2000)
    issue(buffer, range(2, 500))
    large = Cost(buffer, store_next(2000, 1))
    assert large.commands == small.commands
    assert large.bytes <= small.bytes + NOISE_BYTES


def test_nothing_to_lease_above_the_cap_is_found_without_looking_at_what_waits(buffer: Buffer) -> None:
    issue(buffer, range(1), size=2)
    (first, _) = buffer.lease("a", 2, LONG_S)
    buffer.store(Trajectory(first, ()))
    buffer._cap_bytes = 0
    costs(buffer, (50, 5000), lambda many: issue(buffer, range(1, many)), lambda: buffer.lease("b", 64, LONG_S))
    assert buffer.lease("b", 64, LONG_S) == []


def test_news_cost_what_is_new(buffer: Buffer) -> None:
    def grow(groups: int) -> None:
        issue(buffer, range(groups))
        for number in range(groups):
            buffer.store(Trajectory(group(number)[0], ()))

    upto = 0

    def look() -> object:
        nonlocal upto
        news = buffer.closed(TRAIN_STREAM, upto)
        upto = news.upto
        return news

    costs(buffer, (20, 1500), grow, look)
    issue(buffer, range(1500, 1501))
    buffer.cancel(TRAIN_STREAM, 1500, "why")
    assert buffer.closed(TRAIN_STREAM, upto).cancelled == {1500: "why"}
    assert buffer.closed(TRAIN_STREAM, FROM_THE_START).complete == list(range(1500))


def test_no_script_ends_or_removes_more_than_a_part(buffer: Buffer) -> None:
    """Redis serves nobody else while a script runs."""
    many = 1200
    issue(buffer, range(many))
    buffer.lease("dead", many, 0.0)
    calls = buffer._client.info("commandstats")["cmdstat_evalsha"]["calls"]  # type: ignore[index]
    assert buffer.expire() == many
    after = buffer._client.info("commandstats")["cmdstat_evalsha"]["calls"]  # type: ignore[index]
    assert after - calls >= 3
    assert buffer.stats().queued == many

    def remove(first: int) -> Cost:
        numbers = iter(range(first, first + 2))
        return Cost(buffer, lambda: buffer.remove(TRAIN_STREAM, [next(numbers)]))

    among_many = remove(0)
    buffer.remove(TRAIN_STREAM, range(2, many - 10))
    assert remove(many - 10).commands == among_many.commands
    assert buffer.known(TRAIN_STREAM) == set(range(many - 8, many))


def test_heartbeats_are_read_in_a_few_commands(buffer: Buffer) -> None:
    for number in range(1500):
        buffer.heartbeat(f"a{number}", {"stored": number}, 600.0)
    cost = Cost(buffer, buffer.actors)
    assert cost.commands < 20
    assert {facts["stored"] for facts in buffer.actors().values()} == set(range(1500))


def test_a_heartbeat_tells_the_state(buffer: Buffer) -> None:
    assert buffer.heartbeat("a", {}, 600.0) == ""
    buffer.set_state("stopping")
    assert buffer.heartbeat("a", {}, 600.0) == "stopping"


def intake_of(buffer: Buffer, groups: int) -> tuple[Intake, Dispatcher]:
    learner = {"updates": 9, "groups_per_update": groups, "group_size": 2, "max_staleness": 1}
    config = Config.model_validate({"learner": learner})
    dispatcher = Dispatcher(config, {"train": 5})
    prefetch = Prefetcher(buffer, TRAIN_STREAM)
    return Intake(config.learner, buffer, dispatcher, prefetch, reread_s=math.inf), dispatcher


def test_a_poll_of_the_learner_costs_what_is_new(buffer: Buffer) -> None:
    """It comes with every completed group: were it to list all, the cost of an update would grow with its square."""
    found = []
    for groups in (5, 400):
        intake, dispatcher = intake_of(buffer, groups)
        collected = Collected()
        intake.poll(0, collected)
        for ticket in dispatcher.tickets([0, 2]):
            buffer.store(play(ticket, 0, steps=1))
        assert not intake.poll(0, collected)
        assert sorted(collected.groups) == [0, 2]
        found.append(Cost(buffer, lambda intake=intake, collected=collected: intake.poll(0, collected)))
        buffer.remove(TRAIN_STREAM, sorted(buffer.known(TRAIN_STREAM)))
    small, large = found
    assert large.commands == small.commands < 15, (small.by_name, large.by_name)
    assert large.bytes <= small.bytes + NOISE_BYTES


def test_what_redis_has_lost_is_issued_again_when_all_groups_are_read(buffer: Buffer) -> None:
    intake, dispatcher = intake_of(buffer, 2)
    collected = Collected()
    intake.poll(0, collected)
    delete_run(buffer)
    assert not intake.poll(0, collected)
    assert buffer.known(TRAIN_STREAM) == set()
    intake.read_again()
    intake.poll(0, collected)
    assert buffer.known(TRAIN_STREAM) == dispatcher.outstanding


def test_a_group_is_read_once(buffer: Buffer) -> None:
    """What the learner has read is not read ahead once more."""
    issue(buffer, range(2))
    for number in range(2):
        buffer.store(play(group(number)[0], 0, steps=1))
    prefetch = Prefetcher(buffer, TRAIN_STREAM)
    prefetch.want([0, 1])
    prefetch._prefetch()
    assert len(prefetch.read(0)) == 1
    prefetch._prefetch()
    assert sorted(prefetch._held) == [1]
