"""Which folder is whose: a copied or a new run finds nothing in Redis that another one left there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from services.errors import RunBusy
from services.run_folder import LINEAGE_NAME, lineage


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "run"
    made.mkdir()
    return made


def test_a_resumed_run_keeps_its_lineage_and_a_new_start_gets_another(folder: Path) -> None:
    first = lineage(folder, resume=False)
    assert lineage(folder, resume=True) == first
    assert lineage(folder, resume=True) == first
    assert lineage(folder, resume=False) != first


def test_a_copied_folder_is_another_run(folder: Path, tmp_path: Path) -> None:
    first = lineage(folder, resume=False)
    shutil.copytree(folder, tmp_path / "copy")
    copied = lineage(tmp_path / "copy", resume=True)
    assert copied != first
    assert lineage(tmp_path / "copy", resume=True) == copied
    assert lineage(folder, resume=True) == first


def test_a_copy_with_the_same_inode_on_another_file_system_is_another_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = lineage(folder, resume=False)
    elsewhere = SimpleNamespace(f_fsid=os.statvfs(folder).f_fsid + 1)
    monkeypatch.setattr(os, "statvfs", lambda path: elsewhere)
    assert lineage(folder, resume=True) != first


def test_a_moved_folder_is_the_same_run(folder: Path, tmp_path: Path) -> None:
    first = lineage(folder, resume=False)
    folder.rename(tmp_path / "moved")
    assert lineage(tmp_path / "moved", resume=True) == first


@pytest.mark.parametrize("text", [b"", b"\xff\xfe", b"only-an-id", b" \n"])
def test_a_file_that_cannot_be_read_is_no_lineage(folder: Path, text: bytes) -> None:
    (folder / LINEAGE_NAME).write_bytes(text)
    found = lineage(folder, resume=True)
    assert len(found) == 32
    assert lineage(folder, resume=True) == found


def test_a_folder_that_cannot_be_written_is_one_line(folder: Path) -> None:
    (folder / LINEAGE_NAME).mkdir()
    with pytest.raises(RunBusy, match="cannot write the run's folder") as caught:
        lineage(folder, resume=False)
    assert "\n" not in str(caught.value)
