"""Indexes in folders: whole or not there, and what is damaged says so."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from mmap import mmap
from pathlib import Path

import numpy as np
import pytest

from env_servers.webshop.search import storage
from env_servers.webshop.search.index import SearchIndex, build
from env_servers.webshop.search.postings import TYPES, SearchIndexError

DOCUMENTS = [("B2", "blue shoes"), ("B1", "red shoes with laces"), ("B3", "the")]

KILLED = """
import os, signal, sys
from pathlib import Path
from env_servers.webshop.search import postings
from env_servers.webshop.search.index import build

postings._RUN_WORDS = 1

def documents():
    yield "B1", "red shoes"
    yield "B2", "blue shoes"
    os.kill(os.getpid(), signal.SIGKILL)

build(documents(), Path(sys.argv[1]))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build(DOCUMENTS, tmp_path / "index")
    return tmp_path / "index"


def _one_line(error: pytest.ExceptionInfo[SearchIndexError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_an_opened_index_answers_as_one_in_memory(folder: Path) -> None:
    opened, in_memory = SearchIndex.open(folder), SearchIndex.build_in_memory(DOCUMENTS)
    assert len(opened) == 3
    for query in ("shoes", "red shoes", "laces", "the", "nothing"):
        assert opened.hits(query) == in_memory.hits(query)


def test_the_arrays_are_mapped_and_cannot_be_written(folder: Path) -> None:
    found = storage.load(folder, source=None)
    for name in TYPES:
        values = getattr(found, name)
        assert isinstance(values.base, np.memmap | mmap)
        assert not values.flags.writeable


def test_only_the_index_is_left(folder: Path) -> None:
    assert [path.name for path in folder.parent.iterdir()] == ["index"]
    assert {path.name for path in folder.iterdir()} == {storage.MANIFEST, *(f"{name}.npy" for name in TYPES)}
    assert storage.size_of(folder) == sum(len(path.read_bytes()) for path in folder.iterdir())


def test_a_folder_that_is_there_is_left_alone(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(SearchIndexError, match=r"folder already exists: .*; remove it") as error:
        build([("B9", "other")], folder)
    assert str(folder) in _one_line(error)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_the_first_of_two_builds_at_once_stays(tmp_path: Path) -> None:
    target = tmp_path / "index"

    def documents() -> Iterator[tuple[str, str]]:
        build(DOCUMENTS, target)
        yield "B9", "other"

    with pytest.raises(SearchIndexError, match="folder already exists"):
        build(documents(), target)
    assert len(SearchIndex.open(target)) == 3
    assert list(tmp_path.iterdir()) == [target]


def test_documents_that_fail_leave_nothing(tmp_path: Path) -> None:
    def documents() -> Iterator[tuple[str, str]]:
        yield "B1", "red shoes"
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        build(documents(), tmp_path / "index")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_build_leaves_no_folder_that_opens(tmp_path: Path) -> None:
    target = tmp_path / "index"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(target)], timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not target.exists()
    left = list(tmp_path.iterdir())
    assert len(left) == 1
    with pytest.raises(SearchIndexError, match="not a search index"):
        SearchIndex.open(left[0])
    build(DOCUMENTS, target)
    assert len(SearchIndex.open(target)) == 3


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SearchIndexError, match="cannot write the search index") as error:
        build(DOCUMENTS, tmp_path / "file" / "index")
    _one_line(error)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("damage", ["cut", "changed", "removed"])
def test_damage_is_one_clear_line(folder: Path, name: str, damage: str) -> None:
    path = folder / f"{name}.npy"
    data = path.read_bytes()
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(SearchIndexError, match=rf"is damaged: {name}\.npy: .*build it again") as error:
        SearchIndex.open(folder)
    assert str(folder) in _one_line(error)


def test_arrays_of_another_type_are_refused(folder: Path) -> None:
    np.save(folder / "counts.npy", np.array([b"x"]))
    storage.seal(folder, source="")
    with pytest.raises(SearchIndexError, match=r"counts\.npy: invalid type \|S1"):
        SearchIndex.open(folder)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (None, "no readable index.json"),
        ("{", "no readable index.json"),
        ("[]", "of another format"),
        ('{"format": "other", "version": 1}', "of another format"),
        (json.dumps({"format": storage.FORMAT, "version": 0}), "has version 0, expected"),
        (json.dumps({"format": storage.FORMAT, "version": storage.VERSION}), "is damaged"),
    ],
)
def test_foreign_folders_are_refused(folder: Path, manifest: str | None, message: str) -> None:
    if manifest is None:
        (folder / storage.MANIFEST).unlink()
    else:
        (folder / storage.MANIFEST).write_text(manifest)
    with pytest.raises(SearchIndexError, match=message) as error:
        SearchIndex.open(folder)
    assert str(folder) in _one_line(error)


def test_an_index_of_other_documents_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    build(DOCUMENTS, folder, source="some products")
    assert len(SearchIndex.open(folder)) == len(SearchIndex.open(folder, source="some products")) == 3
    with pytest.raises(SearchIndexError, match="was built from other products: remove it") as error:
        SearchIndex.open(folder, source="other products")
    assert str(folder) in _one_line(error)


def test_a_missing_folder_is_no_index(tmp_path: Path) -> None:
    with pytest.raises(SearchIndexError, match="not a search index"):
        SearchIndex.open(tmp_path / "nowhere")
