"""How long work is told of, without a terminal and with one."""

from __future__ import annotations

import pytest
from rich.console import Console

from anchorage.cli import progress
from anchorage.cli.progress import bar, play_summary, remaining, summary
from learner.report import Timings, UpdateReport


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


def test_an_evaluation_says_its_success_so_far_and_its_speed() -> None:
    assert play_summary(0, 0, 12.4) == "no episode ended yet  12 tok/s"
    assert play_summary(3, 4) == "success so far 0.75"


def test_a_terminal_shows_the_same_text_as_it_is() -> None:
    console = Console(record=True, width=200, force_terminal=True)
    with bar(console, "training", 4, "updates") as tell:
        tell(4, "64 episodes  [success]")
    assert "64 episodes  [success]" in console.export_text()


def test_an_update_tells_the_episodes_so_far() -> None:
    report = UpdateReport(
        update=7,
        episodes=8,
        success_rate=0.5,
        mean_reward=5.0,
        mean_steps=9.0,
        valid_fraction=0.9,
        rows=72,
        trained_rows=70,
        response_tokens=700,
        step_group_sizes={1: 5},
        step_group_size_mean=1.0,
        advantage_deviation=1.0,
        cut_fraction=0.0,
        staleness_mean=0.0,
        staleness_max=0,
        dropped_stale=0,
        dropped_equal=0,
        dropped_unreadable=0,
        cancelled=0,
        tokens_per_second=900.0,
        timings=Timings(wait=1.0, prepare=0.1, update=2.0, publish=0.1),
        loss={},
    )
    assert summary(report, 56).startswith("56 episodes  success 0.50  ")
    assert "900 tok/s" in summary(report, 56)
