from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from redis import Redis

from services.errors import RedisUnavailable
from services.process import ReservedPort
from services.redis_server import ADDRESS_NAME, EmbeddedRedis
from tests.waiting import until

TIMEOUT_S = 20.0

CHILD = """
import pathlib, sys, time
from services.redis_server import EmbeddedRedis
server = EmbeddedRedis(pathlib.Path(sys.argv[1]))
server.start()
print(server.pid, flush=True)
time.sleep(600)
"""


def is_gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


def written(url: str) -> bool:
    """Whether the log is with the kernel: Redis holds writes back while an fsync of the last second is under way."""
    with Redis.from_url(url) as client:
        return bool(client.info("persistence")["aof_buffer_length"] == 0)


def test_keeps_its_data_over_a_clean_restart(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as server:
        Redis.from_url(server.url).set("a", "1")
    with EmbeddedRedis(tmp_path) as server:
        assert Redis.from_url(server.url).get("a") == b"1"


def test_recovers_from_kill_at_the_same_address(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as server:
        url = server.url
        with Redis.from_url(url) as client:
            client.set("a", "1")
            assert not server.ensure_running()
            pid = server.pid
            assert pid is not None
            until(lambda: written(url))
            os.kill(pid, signal.SIGKILL)
            until(lambda: server.pid is None)
            assert server.ensure_running()
            assert server.url == url
            assert client.get("a") == b"1"


def test_survives_a_torn_tail_of_the_log(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as server:
        Redis.from_url(server.url).set("a", "1")
    with (tmp_path / "appendonly.aof").open("ab") as log:
        log.write(b"*3\r\n$3\r\nSET\r\n$1\r\nb\r\n$5\r\nha")
    with EmbeddedRedis(tmp_path) as server, Redis.from_url(server.url) as client:
        assert client.get("a") == b"1"
        assert client.get("b") is None


def test_dies_with_a_killed_parent_and_frees_the_folder(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert not is_gone(pid)
    parent.kill()
    parent.wait()
    until(lambda: is_gone(pid))
    with EmbeddedRedis(tmp_path) as server:
        assert Redis.from_url(server.url).ping()


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as server:
        with pytest.raises(RedisUnavailable, match="in use"):
            EmbeddedRedis(tmp_path, lock_timeout_s=0.1).start()
        assert Redis.from_url(server.url).ping()


@pytest.mark.parametrize("folder", ["file/below", "file"])
def test_an_unusable_folder_is_refused(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RedisUnavailable, match="cannot keep Redis data"):
        EmbeddedRedis(tmp_path / folder).start()


def test_a_busy_port_is_left_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Taken:
        """What `ReservedPort` would be without its socket: another process listens at the port first."""

        number: int

        def __enter__(self) -> Taken:
            return self

        def __exit__(self, *_: object) -> None: ...

    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        Taken.number = busy.getsockname()[1]
        ports: list[Taken | ReservedPort] = [Taken(), ReservedPort("127.0.0.1")]
        monkeypatch.setattr("services.process.ReservedPort", lambda host: ports.pop(0))
        with EmbeddedRedis(tmp_path) as server:
            assert not ports
            assert Redis.from_url(server.url).ping()


def test_hides_its_password(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as server:
        password = server.url.split("@")[0].rpartition(":")[2]
        assert password not in Path(f"/proc/{server.pid}/cmdline").read_text()
        others = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ADDRESS_NAME]
        assert all(password.encode() not in path.read_bytes() for path in others)


def test_dies_with_the_thread_that_started_it(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path)
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join(TIMEOUT_S)
    until(lambda: server.pid is None)


def test_stop_is_final_and_repeatable(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path)
    server.start()
    pid = server.pid
    assert pid is not None
    server.stop()
    server.stop()
    assert is_gone(pid)
    assert server.pid is None


def test_the_address_lies_in_a_file_of_the_owner_while_the_server_runs(tmp_path: Path) -> None:
    path = tmp_path / ADDRESS_NAME
    with EmbeddedRedis(tmp_path) as server:
        assert path.read_text() == server.url
        assert path.stat().st_mode & 0o777 == 0o600
        server.stop()
        assert not path.exists()
        server.start()
        assert path.read_text() == server.url
