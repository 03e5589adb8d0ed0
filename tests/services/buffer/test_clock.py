"""Redis' clock is set while a run is under way: a real redis-server under libfaketime, an hour forward and back."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis import Redis

from services.buffer import Buffer
from services.buffer.keys import Keys
from services.config.tree import BufferConfig
from services.redis_server import _executable
from services.schemas import Task, Ticket
from services.weights.coordination import REQUEST_TTL_S, Coordination
from services.weights.rounds import Request
from tests import needs
from tests.processes import free_port
from tests.waiting import until

LIBRARIES = [*Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), *Path("/usr/lib").glob("faketime/libfaketime.so.1")]
HOUR_S = 3600
LEASE_S = 3.0
MARGIN_S = 10.0
"""For a busy machine. What the clock must not cost is an hour."""

pytestmark = pytest.mark.skipif(not LIBRARIES, reason=needs.LIBFAKETIME)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Callable[[int], None]]]:
    """A Redis and a way to set its clock."""
    folder = tmp_path_factory.mktemp("clock")
    offset, port = folder / "offset", free_port()
    offset.write_text("+0")
    environment = os.environ | {
        "LD_PRELOAD": str(LIBRARIES[0]),
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    arguments = [_executable(), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    with subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL) as process:
        url = f"redis://127.0.0.1:{port}/0"
        Buffer.connect(url, "probe", BufferConfig(reconnect_s=30)).close()

        def move(seconds: int) -> None:
            offset.with_suffix(".tmp").write_text(f"{seconds:+d}")
            offset.with_suffix(".tmp").replace(offset)
            with Redis.from_url(url) as client:
                assert abs(client.time()[0] - time.time() - seconds) < MARGIN_S

        yield url, move
        process.kill()


@pytest.fixture
def moved(server: tuple[str, Callable[[int], None]]) -> Iterator[Callable[[int], None]]:
    yield server[1]
    server[1](0)


@pytest.fixture
def buffer(server: tuple[str, Callable[[int], None]], run_name: str) -> Iterator[Buffer]:
    buffer = Buffer.connect(server[0], run_name, BufferConfig(), max_attempts=1)
    yield buffer
    buffer.close()


def group(number: int) -> list[Ticket]:
    task = Task(env="e", split="s", index=0)
    return [Ticket(group=number, member=member, group_size=2, task=task, seed=0) for member in range(2)]


@pytest.mark.parametrize("seconds", [HOUR_S, -HOUR_S, 10 * 365 * 24 * HOUR_S])
def test_no_live_lease_ends_with_a_step_of_the_clock(buffer, moved, seconds):
    """With one attempt allowed, a lease that ended would cancel its group."""
    buffer.issue(group(0))
    ids = [ticket.id for ticket in buffer.lease("a", 2, LEASE_S)]
    for step in (seconds, 0, seconds, 0):
        moved(step)
        assert buffer.expire() == 0
        assert buffer.renew("a", ids, LEASE_S) == []
        assert buffer.expire() == 0
    assert buffer.cancelled("train") == {}


@pytest.mark.parametrize("seconds", [HOUR_S, -HOUR_S])
def test_the_lease_of_a_dead_actor_ends_in_its_time(buffer, moved, seconds):
    buffer.issue(group(0))
    buffer.lease("dead", 1, LEASE_S)
    buffer.heartbeat("dead", {"state": "playing"}, LEASE_S)
    moved(seconds)
    assert list(buffer.actors()) == ["dead"]
    began = time.monotonic()
    until(lambda: buffer.expire() == 1 or bool(buffer.cancelled("train")))
    until(lambda: not buffer.actors())
    took = time.monotonic() - began
    assert LEASE_S / 2 < took < LEASE_S + MARGIN_S


def test_the_clock_follows_redis_while_nobody_sets_it(buffer):
    buffer.issue(group(0))
    buffer.lease("a", 1, 600.0)
    left = [buffer.contents()[0].tickets[0].lease_s]
    began = time.monotonic()
    until(lambda: left.append(buffer.contents()[0].tickets[0].lease_s) or left[0] - left[-1] > 1.5)
    assert left == sorted(left, reverse=True)
    assert left[0] - left[-1] < time.monotonic() - began + 0.2


def test_a_time_in_which_nobody_calls_ends_no_lease_at_once(buffer, server, run_name):
    """After a suspended machine or an unreachable Redis, every holder of a lease has time to renew it."""
    buffer.issue(group(0))
    ids = [ticket.id for ticket in buffer.lease("a", 2, LEASE_S)]
    with Redis.from_url(server[0]) as client:
        client.hincrby(Keys(run_name)["clock"], "server", -1000 * HOUR_S)
    assert buffer.expire() == 0
    assert buffer.renew("a", ids, LEASE_S) == []


@pytest.mark.parametrize("field", ["server", "steady"])
@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e300", "-1", "foreign", "9" * 18])
def test_a_clock_that_is_none_is_set_again(buffer, server, run_name, field, value):
    """With so large a number the clock would stand still, and no lease would ever end."""
    buffer.issue(group(0))
    with Redis.from_url(server[0]) as client:
        client.hset(Keys(run_name)["clock"], mapping={"server": 1, "steady": 1, field: value})
    buffer.lease("dead", 1, 0.2)
    until(lambda: buffer.expire() == 1)


@pytest.mark.parametrize("seconds", [HOUR_S, -HOUR_S])
def test_requests_for_weights_are_void_or_repeated(server, moved, run_name, seconds):
    coordination = Coordination(server[0], run_name, BufferConfig())
    coordination.request(Request("dead", "v1", 1))
    moved(seconds)
    began = time.monotonic()

    def only_the_live() -> bool:
        coordination.request(Request("live", "v1", 1))
        return [request.reader for request in coordination.requests()] == ["live"]

    until(only_the_live)
    assert time.monotonic() - began < REQUEST_TTL_S + MARGIN_S
    coordination.close()
