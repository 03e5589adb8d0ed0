"""The words in which work tells its state."""

from __future__ import annotations

from anchorage.runs.progress import play_summary, update_summary
from learner.report import Timings, UpdateReport


def test_an_evaluation_says_its_success_so_far_and_its_speed() -> None:
    assert play_summary(0, 0, 12.4) == "no episode ended yet  12 tok/s"
    assert play_summary(3, 4) == "success so far 0.75"


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
    assert update_summary(report, 56).startswith("56 episodes  success 0.50  ")
    assert "900 tok/s" in update_summary(report, 56)
