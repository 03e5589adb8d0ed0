"""The deployed Redis on data that a power cut has damaged: it starts, with what of them is sound."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from redis import Redis, exceptions

from tests import needs
from tests.processes import free_port
from tests.waiting import until

SCRIPT = Path(__file__).parents[2] / "deploy" / "redis.sh"
COUNT = 100


def _version() -> int:
    """The major version of the redis-server on PATH; 0 without one, or without redis-check-aof beside it."""
    if shutil.which("redis-server") is None or shutil.which("redis-check-aof") is None:
        return 0
    told = subprocess.run(["redis-server", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"v=(\d+)", told)
    return int(found.group(1)) if found else 0


pytestmark = pytest.mark.skipif(_version() < 7, reason=needs.REDIS_SERVER)


@contextmanager
def served(folder: Path) -> Iterator[tuple[Redis, Path]]:
    """The script's server, a client of it, and what it said."""
    said = folder.parent / "said"
    environment = os.environ | {"ANCHORAGE_REDIS_PASSWORD": "secret", "ANCHORAGE_REDIS_DATA": str(folder)}
    environment["ANCHORAGE_REDIS_PORT"] = str(port := free_port())
    with said.open("w") as out:
        process = subprocess.Popen(["sh", str(SCRIPT)], env=environment, stdout=out, stderr=out)
    client: Redis = Redis(port=port, password="secret", socket_timeout=5)
    try:

        def answers() -> bool:
            assert process.poll() is None, said.read_text()
            try:
                return bool(client.ping())
            except exceptions.RedisError:
                return False

        until(answers)
        yield client, said
    finally:
        process.terminate()
        process.wait()
        client.close()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    with served(folder) as (client, _):
        script = client.register_script("redis.call('INCR', KEYS[1]) redis.call('HSET', KEYS[2], ARGV[1], ARGV[1])")
        for number in range(COUNT):
            script(keys=["n", "h"], args=[number])
    return folder


def log_of(folder: Path) -> Path:
    return max((folder / "appendonlydir").glob("*.incr.aof"))


def zeros(folder: Path) -> None:
    with log_of(folder).open("ab") as log:
        log.write(bytes(4096))


def torn(folder: Path) -> None:
    os.truncate(log_of(folder), log_of(folder).stat().st_size * 7 // 8)


def noise(folder: Path) -> None:
    log = log_of(folder).read_bytes()
    log_of(folder).write_bytes(log[: len(log) // 2] + bytes(range(256)) + log[len(log) // 2 + 256 :])


def base(folder: Path) -> None:
    next((folder / "appendonlydir").glob("*.base.rdb")).write_bytes(bytes(range(256)))


def manifest(folder: Path) -> None:
    next((folder / "appendonlydir").glob("*.manifest")).write_bytes(bytes(range(256)))


def no_manifest(folder: Path) -> None:
    next((folder / "appendonlydir").glob("*.manifest")).unlink()


def test_sound_data_are_left_alone(data: Path) -> None:
    with served(data) as (client, said):
        assert client.hlen("h") == int(client.get("n") or 0) == COUNT
        assert "damaged" not in said.read_text()
    assert not list(data.glob("damaged-*"))


@pytest.mark.parametrize("damage", [zeros, torn, noise, base, manifest, no_manifest])
def test_damaged_data_are_set_aside(data: Path, damage: Callable[[Path], None]) -> None:
    damage(data)
    before = {path.name: path.read_bytes() for path in (data / "appendonlydir").iterdir()}
    with served(data) as (client, said):
        assert client.hlen("h") == int(client.get("n") or 0)
        assert (int(client.get("n") or 0) > 0) == (damage in (zeros, torn, noise))
        assert "the append-only file was damaged" in said.read_text()
        client.set("goes", "on")
    with served(data) as (client, said):
        assert client.get("goes") == b"on"
        assert "damaged" not in said.read_text()
    (aside,) = data.glob("damaged-*")
    # Where the repair failed there are two files of a name: the copy, and what the repair has left.
    kept = {(path.name, path.read_bytes()) for path in aside.rglob("*") if path.is_file()}
    assert before.items() <= kept
