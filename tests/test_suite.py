"""How the suite runs itself: what it says of skipped tests, and how it is dealt to several workers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests import needs, side_by_side
from tests.processes import ROOT


def skipped(reason: str) -> object:
    return SimpleNamespace(longrepr=("file.py", 1, f"Skipped: {reason}"))


def test_skipped_tests_are_told_by_what_is_missing() -> None:
    reports = [skipped(needs.CHROMIUM), skipped("no reason"), *(skipped(needs.debian("golang-go")) for _ in range(10))]
    assert needs.summary([]) == []
    assert needs.summary(reports) == [
        "12 tests were skipped:",
        "  10  golang-go missing: apt-get install golang-go",
        "   1  Chromium is missing: apt-get install chromium",
        "   1  no reason",
    ]


@pytest.mark.parametrize("file", sorted({*side_by_side.ON_RAY, *side_by_side.APART}))
def test_files_that_are_dealt_in_their_own_way_are_there(file: str) -> None:
    assert (ROOT / file).is_file()


def test_every_file_that_uses_the_ray_cluster_is_on_its_worker() -> None:
    users = [path for path in (ROOT / "tests").rglob("test_*.py") if "ray_cluster" in path.read_text()]
    users = [path for path in users if path.name not in ("test_suite.py", "test_chart_schemas.py")]
    assert {side_by_side.scope_of(f"{path.relative_to(ROOT)}::test") for path in users} == {"ray"}


def test_files_stay_together_and_long_ones_begin() -> None:
    alone, together = side_by_side.APART[0], "tests/deploy/test_chart.py"
    assert len({side_by_side.scope_of(f"{alone}::{test}") for test in ("a", "b")}) == 2
    assert len({side_by_side.scope_of(f"{together}::{test}") for test in ("a", "b[c::d]")}) == 1
    items = [SimpleNamespace(nodeid=f"{file}::test") for file in (together, alone, side_by_side.ON_RAY[-1])]
    side_by_side.longest_first(items)  # type: ignore[arg-type]
    assert [item.nodeid.partition("::")[0] for item in items] == [side_by_side.ON_RAY[-1], alone, together]
