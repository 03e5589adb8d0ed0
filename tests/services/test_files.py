from __future__ import annotations

import os
from io import FileIO
from pathlib import Path

import pytest

from services.files import append, new_folder, replacing, write_whole


class Interrupted(BaseException):
    """As Ctrl-C is: not an Exception."""


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths in the order in which they were fsynced."""
    found: list[str] = []

    def fsync(descriptor: int) -> None:
        found.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "fsync", fsync)
    return found


@pytest.mark.parametrize("content", ["grüße", "grüße".encode()])
def test_a_file_is_replaced(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    write_whole(path, content)
    assert path.read_text("utf-8") == "grüße"
    assert os.listdir(tmp_path) == ["file"]


def test_until_the_end_the_old_content_is_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with replacing(path) as file:
        file.write(b"after")
        file.flush()
        assert path.read_text() == "before"
    assert path.read_text() == "after"


@pytest.mark.parametrize("error", [OSError, Interrupted])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_text("before")

    def write_a_part() -> None:
        with replacing(path) as file:
            file.write(b"aft")
            raise error

    with pytest.raises(error):
        write_a_part()
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["file"]


def test_permissions_hold_from_the_first_byte_on(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("")
    path.chmod(0o644)
    with replacing(path, mode=0o600) as file:
        assert os.fstat(file.fileno()).st_mode & 0o777 == 0o600
    assert path.stat().st_mode & 0o777 == 0o600
    umask = os.umask(0o027)
    try:
        write_whole(path, "")
    finally:
        os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o640


def test_durable_is_the_file_before_its_name(tmp_path: Path, synced: list[str]) -> None:
    write_whole(tmp_path / "file", "a")
    assert synced == []
    write_whole(tmp_path / "file", "b", durable=True)
    assert len(synced) == 2
    assert synced[0].startswith(str(tmp_path / ".file."))
    assert synced[1] == str(tmp_path)


def test_a_folder_appears_when_it_is_filled(tmp_path: Path, synced: list[str]) -> None:
    path = tmp_path / "above" / "folder"
    with new_folder(path, durable=True) as partial:
        (partial / "file").write_text("content")
        assert not path.exists()
    assert (path / "file").read_text() == "content"
    assert synced == [str(path.parent)]
    assert os.listdir(path.parent) == ["folder"]


@pytest.mark.parametrize("error", [OSError, Interrupted])
def test_an_error_leaves_no_folder(tmp_path: Path, error: type[BaseException]) -> None:
    def fill_a_part() -> None:
        with new_folder(tmp_path / "folder") as partial:
            (partial / "file").write_text("content")
            raise error

    with pytest.raises(error):
        fill_a_part()
    assert os.listdir(tmp_path) == []


def test_a_folder_starts_empty_and_replaces_no_other(tmp_path: Path) -> None:
    leftover = tmp_path / ".folder.partial"
    leftover.mkdir()
    (leftover / "of a killed process").write_text("")
    path = tmp_path / "folder"
    path.mkdir()
    with new_folder(path) as partial:
        assert os.listdir(partial) == []
        (partial / "file").write_text("content")
    with pytest.raises(OSError, match="not empty"), new_folder(path):
        pass
    assert os.listdir(path) == ["file"]
    assert os.listdir(tmp_path) == ["folder"]


def test_what_is_appended_is_on_disk_after_what_was_there(tmp_path: Path, synced: list[str]) -> None:
    path = tmp_path / "log"
    append(path, "grüße\n", mode=0o640)
    append(path, b"again\n", mode=0o600)
    assert path.read_text("utf-8") == "grüße\nagain\n"
    assert path.stat().st_mode & 0o777 == 0o640 & ~os.umask(os.umask(0))
    assert synced == [str(path)] * 2


def test_an_append_that_is_taken_in_parts_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that is nearly full takes a part of a write."""
    path = tmp_path / "log"
    genuine = open
    with monkeypatch.context() as patched:
        patched.setattr("builtins.open", lambda *args, **named: _Parts(genuine(*args, **named)))
        append(path, "0123456789\n")
    assert path.read_text() == "0123456789\n"


class _Parts:
    """A file that takes three bytes at a time."""

    def __init__(self, file: FileIO) -> None:
        self._file = file

    def __enter__(self) -> _Parts:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, content: memoryview) -> int:
        return self._file.write(content[:3])

    def fileno(self) -> int:
        return self._file.fileno()
