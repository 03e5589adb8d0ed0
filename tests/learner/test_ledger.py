from pathlib import Path

import pytest

from learner.ledger import Entry, Ledger
from services.errors import CheckpointFailed

ENTRIES = [Entry(update, group, [[0], [0, 1]]) for update, group in [(1, 0), (1, 1), (2, 2), (3, 3)]]


def test_round_trip_and_cut(tmp_path):
    ledger = Ledger(tmp_path / "run" / "ledger.jsonl")
    assert ledger.read() == []
    ledger.append(ENTRIES[:2])
    ledger.append(ENTRIES[2:])
    assert ledger.read() == ENTRIES
    ledger.cut(2)
    assert ledger.read() == ENTRIES[:3]


def test_line_cut_off_by_a_crash_is_no_entry(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.append(ENTRIES)
    path.write_text(path.read_text()[:-5])
    assert ledger.read() == ENTRIES[:-1]
    ledger.cut(9)
    ledger.append(ENTRIES[-1:])
    assert ledger.read() == ENTRIES


@pytest.mark.parametrize(
    "damage", [b"garbage\n", b"\0\0\0\n", b"[1]\n", b'{"update": "1", "group": 0}\n', b"\xff\xfe\n", b"\n"]
)
def test_a_damaged_line_is_named_and_skipped(tmp_path, damage, caplog):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.append(ENTRIES)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], damage, *lines[1:], b"\0\0"]))
    assert ledger.read() == ENTRIES
    assert "skipping damaged line 2 of" in caplog.text
    ledger.cut(9)
    assert path.read_bytes() == b"".join(lines)


def test_full_disk_is_one_line():
    with pytest.raises(CheckpointFailed, match="No space left"):
        Ledger(Path("/dev/full")).append(ENTRIES)
