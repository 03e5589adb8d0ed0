"""Append-only data damaged as by a power cut or a bad disk: the server starts, and nothing is deleted."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis import Redis

from services import append_only, redis_server
from services.buffer import Buffer
from services.config.tree import BufferConfig
from services.errors import RedisUnavailable
from services.redis_server import EmbeddedRedis
from tests import needs
from tests.waiting import until

BUNDLED = redis_server._executable()
OTHER = shutil.which("redis-server")
COUNT = 300
NOISE = bytes(range(256)) * 2


@pytest.fixture(params=[BUNDLED, OTHER], ids=["bundled", "installed"])
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled Valkey, and the Redis on PATH: up to 6 it keeps one file, from 7 on a folder."""
    if request.param is None or (request.param == BUNDLED and request.param_index == 1):
        pytest.skip(needs.REDIS_SERVER)
    monkeypatch.setattr(redis_server, "_executable", lambda: request.param)


@pytest.fixture(params=[False, True], ids=["plain", "rewritten"])
def data(request: pytest.FixtureRequest, server: None, tmp_path: Path) -> Path:
    """A folder in which COUNT and COUNT more scripts have each written two keys; `rewritten`: the first ones as RDB."""
    folder = tmp_path / "redis"
    with EmbeddedRedis(folder) as running, Redis.from_url(running.url) as client:
        write(client)
        if request.param:
            client.bgrewriteaof()
            until(lambda: not client.info("persistence")["aof_rewrite_in_progress"])
            until(lambda: not client.info("persistence")["aof_rewrite_scheduled"])
        write(client)
    return folder


def write(client: Redis) -> None:
    script = client.register_script("redis.call('INCR', KEYS[1]) redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])")
    for _ in range(COUNT):
        script(keys=["n", "h"], args=[os.urandom(8), os.urandom(50)])


def log_of(folder: Path) -> Path:
    """The file that commands are appended to."""
    single = folder / append_only.FILE_NAME
    return single if single.exists() else max((folder / append_only.FOLDER_NAME).glob("*.incr.aof"))


def base_of(folder: Path) -> Path:
    single = folder / append_only.FILE_NAME
    return single if single.exists() else next(iter((folder / append_only.FOLDER_NAME).glob("*.base.*")))


def overwrite(path: Path, position: int, noise: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        file.write(noise)


def zeros_behind(folder: Path) -> None:
    with log_of(folder).open("ab") as log:
        log.write(bytes(4096))


def zeros_at_the_end(folder: Path) -> None:
    overwrite(log_of(folder), log_of(folder).stat().st_size - 1000, bytes(1000))


def noise_behind(folder: Path) -> None:
    with log_of(folder).open("ab") as log:
        log.write(NOISE)


def noise_within(folder: Path) -> None:
    overwrite(log_of(folder), log_of(folder).stat().st_size * 7 // 8, NOISE)


def torn(folder: Path) -> None:
    os.truncate(log_of(folder), log_of(folder).stat().st_size * 7 // 8)


def another_command(folder: Path) -> None:
    path = log_of(folder)
    overwrite(path, path.read_bytes().rfind(b"HSET"), b"HZET")


def another_length(folder: Path) -> None:
    path = log_of(folder)
    overwrite(path, path.read_bytes().rfind(b"$50\r\n"), b"$99\r\n")


def noise_at_the_beginning(folder: Path) -> None:
    overwrite(base_of(folder), 20, NOISE[:40])


def noise_everywhere(folder: Path) -> None:
    for path in (folder / append_only.FILE_NAME, *(folder / append_only.FOLDER_NAME).glob("*")):
        if path.exists():
            path.write_bytes(NOISE)


def manifest_of_noise(folder: Path) -> None:
    if (folder / append_only.FOLDER_NAME).exists():
        (folder / append_only.FOLDER_NAME / append_only.MANIFEST_NAME).write_bytes(NOISE)


def no_manifest(folder: Path) -> None:
    if (folder / append_only.FOLDER_NAME).exists():
        (folder / append_only.FOLDER_NAME / append_only.MANIFEST_NAME).unlink()


def no_base(folder: Path) -> None:
    if (folder / append_only.FOLDER_NAME).exists():
        base_of(folder).unlink()


SMALL = [zeros_behind, zeros_at_the_end, noise_behind, noise_within, torn, another_command, another_length]
LARGE = [noise_at_the_beginning, noise_everywhere, manifest_of_noise, no_manifest, no_base]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "aof" in path.name}


def assert_kept(path: Path, before: bytes, folder: Path) -> None:
    """All bytes that were there are still there: in the file, in a folder set aside, or in both, cut in two."""
    aside = [(found.name, found.read_bytes()) for found in folder.glob("damaged-*/**/*") if found.is_file()]
    now = path.read_bytes() if path.exists() else b""
    whole = now.startswith(before) or (path.name, before) in aside
    ends = [(int(name.rpartition("-")[2]), end) for name, end in aside if name.startswith(f"{path.name}.from-")]
    assert whole or any(now.startswith(before[:cut]) and before[cut:] == end for cut, end in ends)


@pytest.mark.parametrize("damage", SMALL + LARGE)
def test_starts_with_the_intact_beginning(
    data: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    damage(data)
    before = contents(data)
    caplog.set_level(logging.WARNING)
    with EmbeddedRedis(data) as running, Redis.from_url(running.url) as client:
        number = int(client.get("n") or 0)
        assert client.hlen("h") == number  # a script's effects are there as a whole
        if damage in SMALL:
            assert COUNT < number <= 2 * COUNT
        client.set("goes", "on")
    with EmbeddedRedis(data) as running, Redis.from_url(running.url) as client:
        assert client.get("goes") == b"on"
    aside = list(data.glob("damaged-*"))
    for path in before:
        assert_kept(path, before[path], data)
    lines = [record.getMessage() for record in caplog.records]
    assert all("\n" not in line for line in lines)
    if number < 2 * COUNT:
        assert any("played again" in line for line in lines)
    if damage in (zeros_behind, noise_behind):
        assert number == 2 * COUNT
        assert len(aside) == len(lines) == 1


def test_a_run_on_data_that_are_gone_goes_on(server: None, tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as running:
        buffer = Buffer.connect(running.url, "run", BufferConfig())
        buffer.set_state("running")
        process = running._process
        assert process is not None
        process.kill()
        process.wait()
        noise_everywhere(tmp_path)
        assert running.ensure_running()
        assert buffer.state() == ""
        buffer.set_state("running")
        buffer.close()


def test_data_that_cannot_be_read_are_left_where_they_are(server: None, tmp_path: Path) -> None:
    """Not damaged, but not usable either: nothing is set aside."""
    (tmp_path / append_only.FILE_NAME).mkdir()
    (tmp_path / append_only.FOLDER_NAME).write_text("")
    with pytest.raises(RedisUnavailable) as caught:
        EmbeddedRedis(tmp_path).start()
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("damaged-*"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip(needs.ROOT)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_one_line(server: None, small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(400 * 1024))
    with EmbeddedRedis(small_disk / "redis") as running:
        buffer = Buffer.connect(running.url, "run", BufferConfig(timeout_s=2, reconnect_s=2))
        with pytest.raises(RedisUnavailable, match="its memory or its disk is full") as caught:
            write_until_full(buffer)
        assert "\n" not in str(caught.value)
        buffer.close()
        running.stop()
        fill(small_disk)
        with pytest.raises(RedisUnavailable, match=re.escape(str(small_disk))) as caught:
            running.start()
        assert "\n" not in str(caught.value)
    assert not list((small_disk / "redis").glob("damaged-*"))


def write_until_full(buffer: Buffer) -> None:
    for _ in range(200):
        buffer.set_manifest('"' + os.urandom(2000).hex() + '"')


def fill(disk: Path) -> None:
    """Leave no byte."""
    with (disk / "rest").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
