"""The dashboard while things change beneath it: a control plane that dies, a run that resumes, pages left too early."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from services.buffer import Buffer
from services.telemetry import MetricsWriter
from tests import needs
from tests.control_runs import UPDATES, make_finished, scalars
from tests.control_server import LIVE, serving

playwright = pytest.importorskip("playwright.sync_api", reason=needs.PLAYWRIGHT)
expect = playwright.expect

Open = Callable[..., Any]

TIMERS = """
const [begin, end] = [window.setInterval, window.clearInterval];
window.repeating = new Set();
window.setInterval = (...args) => { const timer = begin(...args); window.repeating.add(timer); return timer; };
window.clearInterval = (timer) => { window.repeating.delete(timer); end(timer); };
"""


def test_a_dead_control_plane_is_said_and_a_resumed_run_is_shown_as_it_is(open_page: Open, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    config = make_finished(runs, "resumed")
    with serving(runs) as url:
        page = open_page("resumed/run", at=url, allow="ERR_")
        figure = page.locator("figure", has_text="Clip fraction")
        figure.locator("summary").click()
        expect(figure.get_by_role("row")).to_have_count(UPDATES + 1)
        expect(page.locator("#live-badge")).to_have_text("ended")
    expect(page.locator("#live-badge")).to_have_text("no connection")
    # Back to update 2, and on: as many updates as were there before, of which most are others.
    with MetricsWriter(config.run.folder, resume_step=2) as metrics:
        for update in range(3, UPDATES + 2):
            metrics.write(update, scalars(update) | {"loss/clip_fraction": 0.5})
    with serving(runs, urlsplit(url).port or 0):
        expect(page.locator("#live-badge")).to_have_text("ended")
        expect(figure.get_by_role("row")).to_have_count(UPDATES + 2)
        recorded = figure.locator("tbody td:nth-child(3)")
        expect(recorded).to_have_text(["2.0 %"] * 2 + ["50.0 %"] * (UPDATES - 1))


def test_a_run_that_goes_back_drops_what_was_abandoned(open_page: Open, folder: Path, buffer: Buffer) -> None:
    make_finished(folder, "back")
    page = open_page("back/run")
    figure = page.locator("figure", has_text="Clip fraction")
    figure.locator("summary").click()
    expect(figure.get_by_role("row")).to_have_count(UPDATES + 1)
    MetricsWriter(folder / "back", resume_step=-1).close()
    expect(figure.locator("svg")).to_contain_text("no data yet")


def test_a_page_that_was_left_does_not_come_back(open_page: Open) -> None:
    page = open_page(f"{LIVE}/actors")
    expect(page.get_by_role("heading", level=1, name="Actors and buffer")).to_be_visible()
    held: list[Any] = []
    page.route("**/trajectories?*", lambda route: held.append(route))
    page.get_by_role("link", name="Trajectories").click()
    expect(page.locator("nav [aria-current=page]")).to_have_text("Trajectories")
    while not held:
        page.wait_for_timeout(20)
    page.get_by_role("link", name="Anchor explorer").click()
    expect(page.locator("#state-title")).to_be_visible()
    with contextlib.suppress(playwright.Error):  # the page has given the request up
        held[0].continue_()
    page.evaluate("fetch('/health').then((answer) => answer.text())")  # by now the other answer would be there
    expect(page.get_by_role("heading", level=1)).to_have_text("Anchor explorer")
    assert page.title() == f"Anchor explorer · {LIVE} · Anchorage"


def test_the_actors_page_leaves_no_timer_behind(open_page: Open) -> None:
    page = open_page(f"{LIVE}/run", script=TIMERS)
    expect(page.get_by_role("heading", name="Is it learning?")).to_be_visible()
    held: list[Any] = []
    page.route("**/environments", lambda route: held.append(route))
    page.get_by_role("link", name="Actors and buffer").click()
    while not held:
        page.wait_for_timeout(20)
    assert page.evaluate("window.repeating.size") > 0
    page.get_by_role("link", name="Run", exact=True).click()
    expect(page.get_by_role("heading", name="Is it learning?")).to_be_visible()
    with contextlib.suppress(playwright.Error):
        held[0].continue_()
    page.evaluate("fetch('/health').then((answer) => answer.text())")
    assert page.evaluate("window.repeating.size") == 0
