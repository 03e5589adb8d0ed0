"""Files in memory that are written again and again, and who may still read them."""

from __future__ import annotations

import dataclasses
import gc
import os
import subprocess
import sys

import numpy as np
import pytest

from services.weights.memory import Mappings, MemoryFile, MemoryName, MemoryPool, Opened

SIZE = 10_000


@pytest.fixture
def pool() -> MemoryPool:
    return MemoryPool()


def written(pool: MemoryPool, value: int, size: int = SIZE) -> MemoryFile:
    file = pool.take(size)
    file.payload[:] = value
    file.unlock()
    return file


def test_a_reader_sees_what_was_written_and_cannot_write(pool: MemoryPool) -> None:
    payload, _ = Mappings().open(written(pool, 7).name)
    assert payload.nbytes == SIZE
    assert (payload == 7).all()
    with pytest.raises(ValueError, match="read-only"):
        payload[0] = 1


def test_a_file_is_written_again_only_when_nobody_reads_it(pool: MemoryPool) -> None:
    first = written(pool, 1)
    payload, _ = Mappings().open(first.name)
    part = payload[5:]
    del payload
    second = written(pool, 2)
    assert second is not first
    assert (part == 1).all()
    del part
    gc.collect()
    assert pool.take(SIZE) is first


def test_a_file_that_is_kept_for_readers_is_not_written(pool: MemoryPool) -> None:
    first = written(pool, 1)
    kept = Opened(first.name)
    assert written(pool, 2) is not first
    kept.close()
    assert first.lock()


def test_what_is_being_written_cannot_be_opened(pool: MemoryPool) -> None:
    mappings = Mappings()
    file = pool.take(SIZE)
    with pytest.raises(FileNotFoundError, match="being written"):
        mappings.open(file.name)
    file.unlock()
    mappings.open(file.name)
    assert file.lock()
    with pytest.raises(FileNotFoundError, match="being written"):  # also where it is mapped already
        mappings.open(file.name)


def test_the_next_version_in_the_same_file_is_mapped_already(pool: MemoryPool) -> None:
    mappings = Mappings()
    file = written(pool, 1)
    place = mappings.open(file.name)[0].ctypes.data
    assert written(pool, 2) is file
    payload, _ = mappings.open(file.name)
    assert payload.ctypes.data == place
    assert (payload == 2).all()


def test_a_reader_that_hangs_costs_no_more_than_its_own_version(pool: MemoryPool) -> None:
    mappings = Mappings()
    held = [mappings.open(written(pool, value).name)[0] for value in range(4)]
    assert [int(payload[0]) for payload in held] == [0, 1, 2, 3]
    assert len(pool._files) == 2


def test_a_killed_reader_holds_nothing(pool: MemoryPool) -> None:
    script = (
        "import sys; from services.weights.memory import *; payload, _ = "
        "Mappings().open(MemoryName(sys.argv[1], int(sys.argv[2]), True)); print(payload[0], flush=True); input()"
    )
    file = written(pool, 3)
    command = [sys.executable, "-c", script, file.name.path, str(file.name.inode)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == b"3\n"
        assert not file.lock()
        reader.kill()
    assert file.lock()


def test_memory_is_freed_with_its_last_user() -> None:
    def descriptors() -> int:
        gc.collect()
        return sum("anchorage-weights" in target for target in _targets())

    before = descriptors()
    file = MemoryFile(SIZE)
    payload, name = Mappings().open(file.name)
    file.close()
    del file
    assert np.array_equal(np.fromfile(name.path, dtype=np.uint8), payload)
    del payload
    assert descriptors() == before


def test_a_descriptor_that_another_file_has_by_now_is_refused(pool: MemoryPool) -> None:
    file = written(pool, 1)
    with pytest.raises(FileNotFoundError, match="another file"):
        Mappings().open(dataclasses.replace(file.name, inode=file.name.inode + 1))
    file.close()
    with pytest.raises(FileNotFoundError):
        Mappings().open(file.name)
    with pytest.raises(FileNotFoundError):
        Mappings().open(MemoryName("/proc/self/fd/no", 1, True))


def test_another_size_takes_other_files(pool: MemoryPool) -> None:
    small = written(pool, 1)
    large = written(pool, 2, 2 * SIZE)
    assert large.payload.nbytes == 2 * SIZE
    with pytest.raises(FileNotFoundError):
        Mappings().open(small.name)


def _targets() -> list[str]:
    targets = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            targets.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        except FileNotFoundError:  # the one of the listing itself
            continue
    return targets
