"""The Run page's charts in a real headless Chromium: what they draw, what they say, and when they say it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from services.buffer import Buffer
from services.telemetry import MetricsWriter
from tests import needs
from tests.control_runs import UPDATES, make_finished, scalars

expect = pytest.importorskip("playwright.sync_api", reason=needs.PLAYWRIGHT).expect

Open = Callable[..., Any]


def test_charts_are_read_by_keys_and_as_tables(open_page: Open) -> None:
    page = open_page("finished/run")
    figure = page.locator("figure", has_text="Clip fraction")
    expect(figure.locator(".readout")).to_have_text("now: 2.0 % smoothed, 2.0 % recorded")
    figure.locator("svg").focus()
    page.keyboard.press("Home")
    expect(figure.locator(".readout")).to_have_text("update 1: 2.0 % smoothed, 2.0 % recorded")
    page.keyboard.press("ArrowRight")
    expect(figure.locator(".readout")).to_have_text("update 2: 2.0 % smoothed, 2.0 % recorded")
    figure.locator("summary").click()
    expect(figure.get_by_role("row")).to_have_count(UPDATES + 1)
    expect(figure.get_by_role("columnheader")).to_have_text(["Update", "clipped, smoothed", "clipped, as recorded"])


def test_tiles_say_what_their_figure_is(open_page: Open) -> None:
    page = open_page("finished/run")
    raw = scalars(UPDATES)["rollout/success_rate"]
    chart = page.locator("figure", has_text="Success rate")
    expect(chart.locator(".readout")).to_contain_text(f"smoothed, {100 * raw:.0f} % recorded")
    for name, what in (
        ("Success, training", "smoothed over updates"),
        ("Success, evaluation", "newest panel, first 30.0 %"),
        ("Valid actions", "newest update"),
        ("Update time", "newest update"),
    ):
        expect(page.locator(".tile", has_text=name)).to_contain_text(what)


def test_only_the_chart_that_is_walked_is_read_aloud(open_page: Open) -> None:
    page = open_page("finished/run")
    svg = page.locator("figure", has_text="Clip fraction").locator("svg")
    expect(svg.locator(".line").first).to_be_attached()
    assert page.locator(".readout:not([aria-live=off])").count() == 0
    svg.focus()
    assert page.locator("[aria-live=polite]").count() == 1
    page.locator("h1").click()
    svg.blur()
    assert page.locator(".readout:not([aria-live=off])").count() == 0


def test_step_groups_and_time_are_shown_by_their_parts(open_page: Open) -> None:
    page = open_page("finished/run")
    for title, said, parts in (
        ("Step groups by size", "lone step 40 % · 2–4 steps 30 % · 5–8 20 % · 9 or more 10 %", [0.4, 0.3, 0.2, 0.1]),
        ("Time of an update", "update 2 s · wait 1 s · prepare 0.100 s · publish 0.100 s", [2.0, 1.0, 0.1, 0.1]),
    ):
        figure = page.locator("figure", has_text=title)
        figure.locator("svg").focus()
        page.keyboard.press("Home")
        expect(figure.locator(".readout")).to_have_text(f"update 1: {said}")
        expect(figure.locator(".legend li")).to_have_count(4)
        heights = figure.locator(".area").evaluate_all("(all) => all.map((one) => one.getBBox().height)")
        assert heights == pytest.approx([part / sum(parts) * sum(heights) for part in parts], abs=0.3)
        assert (
            len(set(figure.locator(".area").evaluate_all("(all) => all.map((one) => getComputedStyle(one).fill)"))) == 4
        )


def test_what_the_rollouts_bring_is_a_curve(open_page: Open) -> None:
    page = open_page("finished/run")
    figure = page.locator("figure", has_text="Rollout throughput")
    expect(figure.locator(".readout")).to_have_text("now: 200 smoothed, 200 recorded")  # 640 tokens in 3.2 s


def test_a_negative_reward_is_drawn_inside(open_page: Open, folder: Path, buffer: Buffer) -> None:
    make_finished(folder, "negative")
    with MetricsWriter(folder / "negative") as metrics:
        metrics.write(UPDATES + 1, scalars(UPDATES + 1) | {"rollout/mean_reward": -40.0})
    page = open_page("negative/run")
    figure = page.locator("figure", has_text="Reward per episode")
    expect(figure.locator(".readout")).to_contain_text("-40 recorded")
    boxes = figure.locator(".line").evaluate_all("(all) => all.map((one) => [one.getBBox().y, one.getBBox().height])")
    axes = figure.locator("line.axis").evaluate_all("(all) => all.map((one) => Number(one.getAttribute('y1')))")
    assert len(boxes) == 2
    assert all(y >= 8 and y + height <= 176 - 22 + 0.5 for y, height in boxes)
    assert max(axes) - min(axes) > 40
