"""A Redis that the run did not start: an error if it would lose data silently, a warning if a failure costs more."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from services.buffer import Buffer
from services.config.tree import BufferConfig
from services.errors import RedisUnsuitable
from services.redis_server import EmbeddedRedis, _executable
from tests.processes import free_port
from tests.waiting import until

SMALL = BufferConfig(timeout_s=5, reconnect_s=5, max_mib=16)
ROOM = 64 * 2**20
HIGHEST_PORT = 55_535
"""A node of a cluster listens 10,000 above its port, too."""


@pytest.fixture
def start(tmp_path: Path, run_name: str) -> Iterator[Callable[..., Buffer]]:
    """A redis-server with these arguments, and a buffer in it."""
    with ExitStack() as opened:

        def start(*arguments: str, user: str = "") -> Buffer:
            port = next(port for port in iter(free_port, None) if port <= HIGHEST_PORT)
            command = [_executable(), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(tmp_path), *arguments]
            process = opened.enter_context(subprocess.Popen(command, stdout=subprocess.DEVNULL))
            opened.callback(process.kill)
            if user:
                with Redis(port=port) as client:
                    until(lambda: answers(client))
                    client.execute_command("ACL", "SETUSER", *user.split())
            name = f"{user.split()[0]}:secret@" if user else ""
            url = f"redis://{name}127.0.0.1:{port}/0"
            buffer = Buffer.connect(url, run_name, SMALL.model_copy(update={"reconnect_s": 30.0}))
            opened.callback(buffer.close)
            return buffer

        yield start


def answers(client: Redis) -> bool:
    try:
        return bool(client.ping())
    except Exception:
        return False


def refused(buffer: Buffer) -> str:
    with pytest.raises(RedisUnsuitable) as caught:
        buffer.check_server()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_one_as_it_should_be_has_nothing_to_tell(start: Callable[..., Buffer]) -> None:
    buffer = start("--appendonly", "yes", "--maxmemory", str(ROOM))
    assert buffer.check_server() == []
    assert buffer.evicts() is None


@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-lfu", "allkeys-random"])
def test_one_that_evicts_is_refused(start: Callable[..., Buffer], policy: str) -> None:
    buffer = start("--appendonly", "yes", "--maxmemory", str(ROOM), "--maxmemory-policy", policy)
    assert f"has maxmemory-policy {policy}" in refused(buffer)
    assert "set maxmemory-policy noeviction" in refused(buffer)
    assert policy in str(buffer.evicts())


def facts(**changes: object) -> dict[str, object]:
    """Of a Redis as it should be, but for `changes`."""
    return {"maxmemory": ROOM, "maxmemory_policy": "noeviction", "aof_enabled": 1} | changes


@pytest.mark.parametrize("policy", ["eviction", "allkeys-lrm", "something-new"])
def test_a_policy_that_is_not_known_is_refused(
    start: Callable[..., Buffer], monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    """`eviction` is what Dragonfly says of itself as a cache."""
    buffer = start()
    monkeypatch.setattr(buffer._client, "info", lambda: facts(maxmemory_policy=policy))
    assert f"has maxmemory-policy {policy}" in refused(buffer)
    assert policy in str(buffer.evicts())


def test_an_unknown_policy_is_a_warning(start: Callable[..., Buffer], monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = start()
    monkeypatch.setattr(buffer._client, "info", lambda: facts(maxmemory_policy=""))
    (line,) = buffer.check_server()
    assert "does not report its maxmemory-policy" in line


def test_a_policy_without_a_limit_evicts_nothing(start: Callable[..., Buffer]) -> None:
    assert start("--appendonly", "yes", "--maxmemory-policy", "allkeys-lru").check_server() == []


@pytest.mark.parametrize("policy", ["volatile-lru", "volatile-lfu", "volatile-random", "volatile-ttl"])
def test_a_policy_that_cannot_evict_a_runs_keys_is_a_warning(start: Callable[..., Buffer], policy: str) -> None:
    buffer = start("--appendonly", "yes", "--maxmemory", str(ROOM), "--maxmemory-policy", policy)
    assert [policy in line for line in buffer.check_server()] == [True]
    buffer.issue([])
    buffer.set_manifest("{}")
    buffer.heartbeat("a", {}, 60.0)
    assert all(buffer._client.ttl(key) == -1 for key in buffer._client.keys("*"))


def test_a_limit_below_what_the_run_may_store_is_refused(start: Callable[..., Buffer]) -> None:
    line = refused(start("--appendonly", "yes", "--maxmemory", str(10 * 2**20)))
    assert "has maxmemory 10 MiB, but the run may store 16 MiB; set buffer.max_mib=8" in line


def test_a_fifth_of_the_memory_is_left_to_redis(start: Callable[..., Buffer]) -> None:
    buffer = start("--appendonly", "yes", "--maxmemory", str(20 * 2**20))
    assert buffer.check_server() == []
    buffer._client.config_set("maxmemory", 20 * 2**20 - 1)
    assert "set buffer.max_mib=15" in refused(buffer)
    buffer._client.config_set("maxmemory", 16 * 2**20)
    assert "set buffer.max_mib=12" in refused(buffer)


@pytest.mark.parametrize("save", ["", "3600 1"])
def test_a_missing_append_only_file_is_a_warning(start: Callable[..., Buffer], save: str) -> None:
    (line,) = start("--save", save).check_server()
    assert "writes no append-only file" in line
    assert "\n" not in line


def test_a_node_of_a_cluster_is_refused(start: Callable[..., Buffer]) -> None:
    assert "Redis Cluster" in refused(start("--cluster-enabled", "yes", "--appendonly", "yes"))


def test_a_replica_is_refused(start: Callable[..., Buffer]) -> None:
    buffer = start("--appendonly", "yes")
    buffer._client.replicaof("127.0.0.1", "9")
    assert "is a replica; name the primary" in refused(buffer)


@pytest.mark.parametrize(
    ("rights", "expected"),
    [
        ("+@all -config", None),
        ("+@all -info", None),
        ("+@all -info -config", "lets this user read neither INFO nor CONFIG"),
    ],
)
def test_what_is_forbidden_is_done_without(start: Callable[..., Buffer], rights: str, expected: str | None) -> None:
    """A managed Redis forbids CONFIG at least."""
    buffer = start("--appendonly", "yes", "--maxmemory", str(ROOM), user=f"me on >secret ~* {rights}")
    lines = buffer.check_server()
    assert [expected in line for line in lines] == ([] if expected is None else [True])


@pytest.mark.parametrize("hidden", [("config",), ("info",)])
def test_an_evicting_one_with_commands_renamed_is_refused(start: Callable[..., Buffer], hidden: tuple[str]) -> None:
    arguments: list[Any] = ["--maxmemory", str(ROOM), "--maxmemory-policy", "allkeys-lru"]
    for name in hidden:
        arguments += ["--rename-command", name, ""]
    assert "allkeys-lru" in refused(start(*arguments))


def test_an_older_one_is_refused(start: Callable[..., Buffer], monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = start("--appendonly", "yes")
    monkeypatch.setattr("services.buffer.suitability.OLDEST", (99, 0))
    assert "use 99.0 or newer" in refused(buffer)


def test_the_runs_own_has_nothing_to_tell(tmp_path: Path, run_name: str) -> None:
    with EmbeddedRedis(tmp_path) as server:
        buffer = Buffer.connect(server.url, run_name, BufferConfig())
        assert buffer.check_server() == []
        buffer.close()
