"""The judge of chaos runs finds what it is there to find."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.history import Entry, given_up, judge, read_ledger


def entries(*groups: int) -> list[Entry]:
    return [Entry(1 + place // 2, group, [[place // 2]]) for place, group in enumerate(groups)]


def verdict(history: list[Entry], abandoned: set[int] | None = None) -> tuple[int, int, int, int, int]:
    found = judge(history, abandoned or set(), per_update=2, max_staleness=1)
    return found.groups_trained, found.lost, found.twice, found.too_stale, found.torn


def test_a_clean_history() -> None:
    assert verdict(entries(0, 1, 2, 3)) == (4, 0, 0, 0, 0)


def test_lost_and_given_up_groups() -> None:
    assert verdict(entries(0, 1, 3, 4)) == (4, 1, 0, 0, 0)
    assert verdict(entries(0, 1, 3, 4), {2}) == (4, 0, 0, 0, 0)


def test_a_group_trained_on_twice() -> None:
    assert verdict(entries(0, 1, 1, 2)) == (4, 0, 1, 0, 0)


def test_old_tokens_and_torn_updates() -> None:
    assert verdict([*entries(0, 1), Entry(2, 2, [[1], [1]]), Entry(3, 3, [[2, 0], [2]])]) == (4, 0, 0, 1, 2)


def test_reading(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"update": 1, "group": 0, "versions": [[0]]}\n{"update": 1, "gro')
    assert read_ledger(path) == [Entry(1, 0, [[0]])]
    assert given_up(["group 3 cancelled: x\ngroup 12 cancelled: y", ""]) == {3, 12}
