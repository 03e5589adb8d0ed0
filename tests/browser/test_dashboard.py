"""The dashboard in a real headless Chromium, over a finished and a live run whose texts are hostile.

With `DASHBOARD_SCREENSHOTS=FOLDER` every page's picture is kept there, to be looked at.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from services.buffer import Buffer
from services.telemetry import MetricsWriter
from tests.control_runs import HOSTILE, UPDATES, beat, scalars
from tests.control_server import ADMIN, LIVE, READ

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (requirements/dev.txt)")
expect = playwright.expect
expect.set_options(timeout=60_000)  # a busy machine is no failure

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: install Debian's package chromium")

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PAGES = {
    "run": "Success rate",
    "trajectories": "group 10, episode 1",
    "explorer": "The actions within one state",
    "actors": "Environment servers",
}

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any, url: str) -> Iterator[Open]:
    """Opens an address of the dashboard; afterwards nothing may have gone wrong in any page."""
    troubles: list[str] = []
    contexts = []

    def open_(address: str, token: str | None = ADMIN, *, width: int = 1280, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: message.type in ("error", "warning") and troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        if token is not None:
            context.add_init_script(f"sessionStorage.setItem('anchorage-token', '{token}')")
        page.goto(f"{url}/#/{address}")
        return page

    yield open_
    for context in contexts:
        context.close()
    # A refused token is told by a status that Chromium logs; the pages say it too.
    assert [trouble for trouble in troubles if "401" not in trouble and "403" not in trouble] == []


@pytest.mark.parametrize("page_name", PAGES)
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_every_page_fits_and_speaks(open_page: Open, page_name: str, width: int, scheme: str) -> None:
    page = open_page(f"{LIVE}/{page_name}", width=width, scheme=scheme)
    expect(page.get_by_text(PAGES[page_name]).first).to_be_visible()
    expect(page.locator("#live-badge")).to_have_text(re.compile("running|paused"))
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert _unlabelled(page) == []
    assert page.locator("h1").count() == 1
    assert page.locator("main").count() == 1
    expect(page.locator("nav [aria-current=page]")).to_have_count(1)
    _keep(page, f"{page_name}-{'wide' if width > 600 else 'phone'}-{scheme}")


def test_the_token_is_asked_for_and_kept_in_the_tab(open_page: Open) -> None:
    page = open_page(f"{LIVE}/run", token=None)
    page.get_by_label("Token").fill("wrong-token-000000000")
    page.get_by_role("button", name="Open the dashboard").click()
    expect(page.get_by_role("alert")).to_have_text("This token was not accepted.")
    _keep(page, "token")
    page.get_by_label("Token").fill(READ)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Is it learning?")).to_be_visible()
    assert READ not in page.url
    page.reload()
    expect(page.get_by_role("heading", name="Is it learning?")).to_be_visible()
    page.get_by_role("button", name="Forget token").click()
    expect(page.get_by_label("Token")).to_be_visible()
    assert page.evaluate("sessionStorage.length") == 0


def test_hostile_text_stays_text(open_page: Open, buffer: Buffer) -> None:
    beat(buffer, LIVE)
    page = open_page(f"{LIVE}/trajectories/1/0")
    expect(page.locator(".thought", has_text=HOSTILE)).to_be_visible()
    for summary in page.locator("article summary").all():
        summary.click()
    page.goto(page.url.replace("trajectories/1/0", "actors"))
    expect(page.get_by_role("cell", name=HOSTILE)).to_be_visible()
    assert page.locator("main img, main script").count() == 0
    assert page.title() == f"{LIVE} · Anchorage"


def test_a_finished_run_says_so_and_offers_nothing(open_page: Open) -> None:
    page = open_page("finished/run")
    expect(page.get_by_text("not live: its Redis does not answer")).to_be_visible()
    page.get_by_role("link", name="Actors and buffer").click()
    expect(page.get_by_text("The run is not live.", exact=True)).to_be_visible()
    expect(page.get_by_role("button", name="Pause")).to_be_disabled()


def test_runs_are_listed_and_can_be_switched(open_page: Open) -> None:
    page = open_page("")
    expect(page.get_by_role("row")).to_have_count(3)
    page.get_by_role("link", name="finished").click()
    expect(page.get_by_role("heading", level=1, name="finished")).to_be_visible()
    page.get_by_role("combobox", name="Run").select_option(LIVE)
    expect(page.get_by_role("heading", level=1, name=LIVE)).to_be_visible()


def test_what_happens_is_seen_without_a_reload(open_page: Open, folder: Path, buffer: Buffer) -> None:
    page = open_page(f"{LIVE}/run")
    tile = page.locator(".tile", has_text="Update").first
    expect(tile).to_contain_text(str(UPDATES))
    with MetricsWriter(folder / LIVE, tensorboard=False) as metrics:
        metrics.write(UPDATES + 5, scalars(UPDATES + 5))
    expect(tile).to_contain_text(str(UPDATES + 5))
    buffer.set_state("paused")
    expect(page.locator("#live-badge")).to_have_text("paused")
    buffer.set_state("running")


def test_charts_are_read_by_keys_and_as_tables(open_page: Open) -> None:
    page = open_page("finished/run")
    figure = page.locator("figure", has_text="Clip fraction")
    expect(figure.locator(".readout")).to_have_text("now: 2.0 %")
    figure.locator("svg").focus()
    page.keyboard.press("Home")
    expect(figure.locator(".readout")).to_have_text("update 1: 2.0 %")
    page.keyboard.press("ArrowRight")
    expect(figure.locator(".readout")).to_have_text("update 2: 2.0 %")
    figure.locator("summary").click()
    expect(figure.get_by_role("row")).to_have_count(UPDATES + 1)


def test_episodes_are_found_by_filters(open_page: Open) -> None:
    page = open_page("finished/trajectories")
    count = page.locator(".list-side [role=status]")
    expect(count).to_contain_text("48 episodes")
    page.get_by_label("Outcome").select_option("won")
    expect(count).to_contain_text("24 episodes")
    page.get_by_label("Policy version").fill("3")
    page.keyboard.press("Enter")
    expect(count).to_contain_text("4 episodes")
    page.locator(".pick").nth(1).click()
    expect(page.locator("article .badge.good").first).to_have_text("won")
    expect(page.locator("article .step").first).to_contain_text("You are at start.")
    page.get_by_label("Outcome").select_option("")
    page.get_by_label("Policy version").fill("")


def test_the_explorer_is_walked_by_keys(open_page: Open) -> None:
    page = open_page("finished/explorer/2")
    first = page.locator(".graph .node[data-state='0']")
    first.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#state-title")).to_contain_text("State 0: 4 steps of 4 episodes")
    expect(page.locator(".graph .node[data-state='0']")).to_be_focused()
    expect(page.locator(".worked")).to_contain_text("For example in state 0")
    expect(page.locator(".said")).to_have_text("You are at start.")
    page.get_by_role("button", name="○ 2").click()
    assert page.locator(".graph .node.faded").count() > 0
    page.get_by_role("link", name="read").nth(1).click()
    expect(page.get_by_role("heading", level=1, name="Trajectories")).to_be_visible()


def test_an_action_is_confirmed_first(open_page: Open, buffer: Buffer) -> None:
    buffer.set_state("running")
    page = open_page(f"{LIVE}/actors")
    page.get_by_role("button", name="Checkpoint now").click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("dialog")).to_have_count(0)
    assert buffer.commands.all() == []
    page.get_by_role("button", name="Scale …").click()
    page.get_by_role("spinbutton", name="Rollout actors").fill("3")
    _keep(page, "confirm")
    page.get_by_role("dialog").get_by_role("button", name="Scale").click()
    expect(page.get_by_text("wanted now: 3 rollout actors")).to_be_visible()
    assert buffer.desired_actors() == 3


def test_the_read_token_has_no_buttons_to_press(open_page: Open) -> None:
    page = open_page(f"{LIVE}/actors", token=READ)
    expect(page.get_by_text("The read token may look, not act.")).to_be_visible()
    for button in page.locator(".actions button").all():
        expect(button).to_be_disabled()


def _unlabelled(page: Any) -> list[str]:
    """Controls without a name, and pictures without a text."""
    found: list[str] = page.evaluate(
        """() => [...document.querySelectorAll('button, input, select, a, img, [role=img], [role=button]')]
            .filter((one) => !(one.getAttribute('aria-label') || one.textContent.trim() || one.labels?.length
                || one.hasAttribute('alt')))
            .map((one) => one.outerHTML.slice(0, 120))"""
    )
    return found


def _keep(page: Any, name: str) -> None:
    folder = os.environ.get("DASHBOARD_SCREENSHOTS")
    if folder:
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)
