from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from services.buffer import Buffer, Stored
from services.buffer.connection import Connection
from services.config.tree import BufferConfig
from services.errors import RedisUnavailable
from services.redis_server import EmbeddedRedis
from services.schemas import Task, Ticket, Trajectory
from tests.waiting import until

LONG_S = 60.0
IMPATIENT = BufferConfig(timeout_s=5.0, reconnect_s=0.1)


def ticket(group: int) -> Ticket:
    return Ticket(group=group, member=0, group_size=1, task=Task(env="e", split="s", index=0), seed=0)


def written(url: str) -> bool:
    """Whether the log is with the kernel: Redis holds writes back while an fsync of the last second is under way."""
    with Redis.from_url(url) as client:
        return bool(client.info("persistence")["aof_buffer_length"] == 0)


@pytest.mark.parametrize(
    "url", ["http://user:hunter2@h:1/0", "hunter2", "hunter2://x", "redis://:hunter2@h:port/0", "redis:hunter2", ""]
)
def test_what_is_no_address_is_refused(run_name: str, url: str) -> None:
    with pytest.raises(RedisUnavailable, match=r"buffer\.redis_url is not the address") as caught:
        Buffer.connect(url, run_name, IMPATIENT)
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_password_is_final(redis_url: str, run_name: str) -> None:
    wrong = redis_url.replace("redis://:", "redis://:hunter2")
    with pytest.raises(RedisUnavailable, match=r"redis://127\.0\.0\.1:\d+/0 refuses the user or password") as caught:
        Buffer.connect(wrong, run_name, BufferConfig(reconnect_s=3600))
    assert "hunter2" not in str(caught.value)


def test_a_missing_password_is_final(redis_url: str, run_name: str) -> None:
    bare = "redis://" + redis_url.partition("@")[2]
    with pytest.raises(RedisUnavailable, match="refuses the user or password"):
        Buffer.connect(bare, run_name, BufferConfig(reconnect_s=3600))


@pytest.mark.parametrize("listens", [True, False])
def test_a_dead_or_silent_address_is_one_line(run_name: str, listens: bool, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as endpoint, caplog.at_level(logging.DEBUG):
        endpoint.bind(("127.0.0.1", 0))
        if listens:
            endpoint.listen()
        url = f"redis://:hunter2@127.0.0.1:{endpoint.getsockname()[1]}/0"
        with pytest.raises(RedisUnavailable, match=r"cannot reach Redis at redis://127\.0\.0\.1") as caught:
            Buffer.connect(url, run_name, BufferConfig(timeout_s=0.3, reconnect_s=0.5))
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value) + caplog.text
    assert "trying again" in caplog.text


def test_a_redis_without_room_is_one_line(tmp_path: Path, run_name: str) -> None:
    with EmbeddedRedis(tmp_path) as server:
        buffer = Buffer.connect(server.url, run_name, IMPATIENT)
        with Redis.from_url(server.url) as client:
            client.config_set("maxmemory", 1)
            with pytest.raises(RedisUnavailable, match="memory or its disk is full"):
                buffer.issue([ticket(0)])
            client.config_set("maxmemory", 0)
        assert buffer.issue([ticket(0)]) == 1
        buffer.close()


def test_a_killed_redis_comes_back_with_everything(tmp_path: Path, run_name: str) -> None:
    with EmbeddedRedis(tmp_path) as server:
        buffer = Buffer.connect(server.url, run_name, BufferConfig(timeout_s=5, reconnect_s=60))
        buffer.issue([ticket(0), ticket(1), ticket(2)])
        stored, held = buffer.lease("a", 2, LONG_S)
        buffer.store(Trajectory(stored, ()))
        until(lambda: written(server.url))
        pid = server.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        with ThreadPoolExecutor(1) as threads:
            renewal = threads.submit(buffer.renew, "a", [held.id], LONG_S)
            until(lambda: server.pid is None)
            assert server.ensure_running()
            assert renewal.result(60) == []
        assert buffer.complete("train") == [0]
        assert [t.ticket for t in buffer.read("train", 0)] == [stored]
        assert buffer.store(Trajectory(stored, ())) is Stored.DUPLICATE
        assert buffer.lease("b", 9, LONG_S) == [ticket(2)]
        buffer.close()


def test_a_repeated_call_after_a_lost_answer_changes_nothing(redis_url: str, run_name: str) -> None:
    """Every script is carried out twice, as if its first answer had been lost."""
    connection = Connection(redis_url, BufferConfig())
    once = connection.call

    def twice(operation: Callable[[], Any]) -> Any:
        once(operation)
        return once(operation)

    connection.call = twice  # type: ignore[method-assign]
    buffer = Buffer(connection, run_name, BufferConfig(), max_attempts=2)
    buffer.issue([ticket(0), ticket(1), ticket(2)])
    buffer.store(Trajectory(ticket(0), ()))
    assert buffer.lease("a", 2, LONG_S) == []  # both are leased, to the call whose answer was lost
    assert not buffer.fail("a", ticket(1).id, "once")
    buffer.release("a", [ticket(2).id])
    buffer.append_metrics({"step": 1})
    assert (buffer.stats().queued, buffer.stats().leased) == (2, 0)
    assert len(buffer.read("train", 0)) == 1
    assert buffer.metrics() == [{"step": 1}]
    size = buffer.stats().trajectory_bytes
    buffer.remove("train", [1])
    assert buffer.stats().trajectory_bytes == size
    buffer.close()
