"""How long work is told of, without a terminal and with one."""

from __future__ import annotations

import pytest
from rich.console import Console

from anchorage.cli import progress
from anchorage.cli.progress import Display, bar, remaining
from anchorage.runs.progress import Progress


def test_plain_lines_say_how_long_it_will_take(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 105.0, 130.0, 190.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    console = Console(record=True, width=20, force_terminal=False)
    with bar(console, "[play]", 20, "episodes") as tell:
        tell(0, "[none]")
        tell(1, "too soon for another line")
        tell(5, "success 0.50")
        tell(20, "")
    assert [line.rstrip() for line in console.export_text().splitlines()] == [
        "[play]: 0/20 episodes  eta -:--:--  [none]",
        "[play]: 5/20 episodes  eta 0:01:30  success 0.50",
        "[play]: 20/20 episodes  eta 0:00:00",
    ]


def test_the_time_left_is_that_of_the_work_done_so_far() -> None:
    assert remaining(60.0, 1, 119) == "1:59:00"
    assert remaining(1.0, 0, 5) == "-:--:--"


def test_a_terminal_shows_the_same_text_as_it_is() -> None:
    console = Console(record=True, width=200, force_terminal=True)
    with bar(console, "training", 4, "updates") as tell:
        tell(4, "64 episodes  [success]")
    assert "64 episodes  [success]" in console.export_text()


def test_each_work_has_a_bar_of_its_own_and_each_part_a_line() -> None:
    console = Console(record=True, width=20, force_terminal=False)
    with Display(console) as display:
        display(Progress("setup", text="starting [redis]"))
        display(Progress("evaluation", "before", 0, 4, "episodes"))
        display(Progress("evaluation", "before", 4, 4, "episodes", "success 0.50"))
        display(Progress("training", "training", 0, 2, "updates"))
        display(Progress("training", "training", 2, 2, "updates", "8 episodes"))
    assert [line.rstrip() for line in console.export_text().splitlines()] == [
        "starting [redis]",
        "before: 4/4 episodes  eta 0:00:00  success 0.50",
        "training: 2/2 updates  eta 0:00:00  8 episodes",
    ]
