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
    with pytest.raises(RedisUnavailable, match=r"buffer\.redis_url \(or \$REDIS_URL\) is not the address") as caught:
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
    assert "retrying" in caplog.text


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


@pytest.mark.parametrize(
    ("settings", "role", "line"),
    [
        ({}, ("127.0.0.1", "9"), "is a read-only replica; name the primary"),
        ({"min-replicas-to-write": 1}, None, "cannot serve requests now: NOREPLICAS"),
        ({"replica-serve-stale-data": "no"}, ("127.0.0.1", "9"), "cannot serve requests now"),
    ],
)
def test_a_redis_that_does_not_serve_for_a_while_is_waited_for(
    tmp_path: Path, run_name: str, settings: dict[str, Any], role: tuple[str, str] | None, line: str
) -> None:
    """As while its primary is replaced. What a command within a script is answered is an error of the script."""
    with EmbeddedRedis(tmp_path) as server, Redis.from_url(server.url) as client:
        impatient, patient = (
            Buffer.connect(server.url, run_name, config) for config in (IMPATIENT, BufferConfig(reconnect_s=LONG_S))
        )
        before = {name: client.config_get(name)[name] for name in settings}
        for name, value in settings.items():
            client.config_set(name, value)
        if role is not None:
            client.execute_command("REPLICAOF", *role)
        for call in (lambda: impatient.issue([ticket(0)]), lambda: impatient.set_state("running")):
            with pytest.raises(RedisUnavailable, match=line) as caught:
                call()
            assert type(caught.value) is RedisUnavailable
            assert "\n" not in str(caught.value)
        with ThreadPoolExecutor() as pool:
            issued = pool.submit(patient.issue, [ticket(0)])
            for name, value in before.items():
                client.config_set(name, value)
            client.execute_command("REPLICAOF", "NO", "ONE")
            assert issued.result() == 1
        impatient.close()
        patient.close()


def test_a_redis_that_is_busy_with_a_script_is_waited_for(tmp_path: Path, run_name: str) -> None:
    with EmbeddedRedis(tmp_path) as server, Redis.from_url(server.url) as client:
        buffer = Buffer.connect(server.url, run_name, IMPATIENT)
        client.config_set("lua-time-limit", 50)
        with ThreadPoolExecutor() as pool:
            busy = pool.submit(Redis.from_url(server.url).eval, "while true do end", 0)
            until(lambda: is_busy(client))
            with pytest.raises(RedisUnavailable, match="cannot serve requests now: BUSY") as caught:
                buffer.issue([ticket(0)])
            assert type(caught.value) is RedisUnavailable
            client.script_kill()
            assert busy.exception() is not None
        assert buffer.issue([ticket(0)]) == 1
        buffer.close()


def is_busy(client: Redis) -> bool:
    try:
        client.ping()
    except Exception as error:
        return "BUSY" in str(error)
    return False


def test_a_user_without_permission_for_a_command_of_a_script_gets_an_error(tmp_path: Path, run_name: str) -> None:
    with EmbeddedRedis(tmp_path) as server, Redis.from_url(server.url) as client:
        client.execute_command("ACL", "SETUSER", "me", "on", ">secret", "~*", "+@all", "-zadd")
        address = server.url.partition("@")[2]
        buffer = Buffer.connect(f"redis://me:secret@{address}", run_name, BufferConfig(reconnect_s=3600))
        with pytest.raises(RedisUnavailable, match="denies the user a command the buffer needs") as caught:
            buffer.issue([ticket(0)])
        assert type(caught.value) is RedisUnavailable
        buffer.close()
