"""How long work is told of, without a terminal and with one."""

from __future__ import annotations

from rich.console import Console

from services.cli import progress
from services.cli.progress import bar, play_summary, remaining


def test_plain_lines_say_how_long_it_will_take(monkeypatch) -> None:  # type: ignore[no-untyped-def]
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


def test_an_evaluation_says_its_success_so_far_and_its_speed() -> None:
    assert play_summary(0, 0, 12.4) == "no episode ended yet  12 tok/s"
    assert play_summary(3, 4) == "success so far 0.75"


def test_a_terminal_shows_the_same_text_as_it_is() -> None:
    console = Console(record=True, width=200, force_terminal=True)
    with bar(console, "training", 4, "updates") as tell:
        tell(4, "64 episodes  [success]")
    assert "64 episodes  [success]" in console.export_text()
