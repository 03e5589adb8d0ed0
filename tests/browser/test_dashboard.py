"""The dashboard in a real headless Chromium, over a finished and a live run whose texts are hostile.

With `DASHBOARD_SCREENSHOTS=FOLDER` every page's picture is kept there, to be looked at.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from learner.record import WarningLog
from services.buffer import Buffer
from services.telemetry import MetricsWriter
from tests import needs
from tests.browser.chromium import keep, unlabelled
from tests.control_runs import HOSTILE, UPDATES, beat, scalars
from tests.control_server import ADMIN, LIVE, READ

expect = pytest.importorskip("playwright.sync_api", reason=needs.PLAYWRIGHT).expect

PAGES = {
    f"{LIVE}/run": ("Success rate", f"Run · {LIVE} · Anchorage"),
    f"{LIVE}/trajectories": ("group 10, episode 1", f"Trajectories · {LIVE} · Anchorage"),
    f"{LIVE}/explorer": ("The actions within one state", f"Anchor explorer · {LIVE} · Anchorage"),
    f"{LIVE}/actors": ("Environment servers", f"Actors and buffer · {LIVE} · Anchorage"),
    "": ("Newest record", "Runs · Anchorage"),
    "token": ("Token required", "Token · Anchorage"),
}

Open = Callable[..., Any]


@pytest.mark.parametrize("address", PAGES)
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_every_page_fits_and_speaks(open_page: Open, address: str, width: int, scheme: str) -> None:
    page = open_page(address, None if address == "token" else ADMIN, width=width, scheme=scheme)
    text, title = PAGES[address]
    expect(page.get_by_text(text).first).to_be_visible()
    expect(page).to_have_title(title)
    if address.startswith(LIVE):
        expect(page.locator("#live-badge")).to_have_text(re.compile("running|paused"))
        expect(page.locator("nav [aria-current=page]")).to_have_count(1)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert unlabelled(page) == []
    assert page.locator("h1").count() == 1
    assert page.locator("main").count() == 1
    # The colours are the scheme's: light on dark, or dark on light.
    ground, ink = (
        _brightness(page, f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color")
    )
    assert (ground > 200 and ink < 80) if scheme == "light" else (ground < 60 and ink > 200)
    keep(page, f"{address.split('/')[-1] or 'runs'}-{'wide' if width > 600 else 'phone'}-{scheme}")


def test_a_control_without_a_name_is_found(open_page: Open) -> None:
    page = open_page("", token=None)
    page.goto("about:blank")
    page.set_content(
        "<label>Named <select><option>a</option></select></label><select id=bare><option>b</option></select>"
        "<label><input></label><button>yes</button><button></button><img alt=''><img>"
    )
    assert [re.match(r"<(\w+)", one)[1] for one in unlabelled(page)] == ["select", "input", "button", "img"]  # type: ignore[index]


def test_the_theme_button_changes_the_colours_and_is_remembered(open_page: Open) -> None:
    page = open_page("")
    before = _brightness(page, "getComputedStyle(document.body).backgroundColor")
    page.get_by_role("button", name="Switch between light and dark").click()
    after = _brightness(page, "getComputedStyle(document.body).backgroundColor")
    assert before > 200
    assert after < 60
    page.reload()
    assert _brightness(page, "getComputedStyle(document.body).backgroundColor") == after
    page.get_by_role("button", name="Switch between light and dark").click()
    assert _brightness(page, "getComputedStyle(document.body).backgroundColor") == before


def test_the_token_is_requested_and_kept_in_the_tab(open_page: Open) -> None:
    page = open_page(f"{LIVE}/run", token=None)
    page.get_by_label("Token").fill("wrong-token-000000000")
    page.get_by_role("button", name="Open the dashboard").click()
    expect(page.get_by_role("alert")).to_have_text("This token was not accepted.")
    keep(page, "token")
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
    assert page.title() == f"Actors and buffer · {LIVE} · Anchorage"


def test_a_finished_run_says_so_and_offers_nothing(open_page: Open) -> None:
    page = open_page("finished/run")
    expect(page.get_by_text("data from the run's folder; its Redis stopped with it")).to_be_visible()
    page.get_by_role("link", name="Actors and buffer").click()
    expect(page.get_by_text("The run is not live.", exact=True)).to_be_visible()
    expect(page.get_by_role("button", name="Pause")).to_be_disabled()


def test_runs_are_listed_and_can_be_switched(open_page: Open) -> None:
    page = open_page("")
    expect(page.get_by_role("row")).to_have_count(3)  # with the heads of the columns
    page.get_by_role("link", name="finished").click()
    expect(page.get_by_role("heading", level=1, name="finished")).to_be_visible()
    page.get_by_role("combobox", name="Run").select_option(LIVE)
    expect(page.get_by_role("heading", level=1, name=LIVE)).to_be_visible()


def test_what_happens_is_seen_without_a_reload(open_page: Open, folder: Path, buffer: Buffer) -> None:
    page = open_page(f"{LIVE}/run")
    tile = page.locator(".tile", has_text="Update").first
    expect(tile).to_contain_text(str(UPDATES))
    with MetricsWriter(folder / LIVE) as metrics:
        metrics.write(UPDATES + 5, scalars(UPDATES + 5))
    expect(tile).to_contain_text(str(UPDATES + 5))
    buffer.set_state("paused")
    expect(page.locator("#live-badge")).to_have_text("paused")
    buffer.set_state("running")


def test_warnings_are_on_the_run_s_page_newest_first(open_page: Open, folder: Path, buffer: Buffer) -> None:
    log = WarningLog(folder / LIVE)
    log.clear()
    page = open_page(f"{LIVE}/run")
    expect(page.get_by_role("heading", name="Is it learning?")).to_be_visible()
    expect(page.get_by_role("heading", name=re.compile("warning"))).to_have_count(0)
    log.append(3, "equal_rewards", "update 3: all rewards of each group were equal")
    expect(page.get_by_role("heading", name="1 warning")).to_be_visible()
    log.append(5, "no_valid_action", f"update 5: {HOSTILE}")
    expect(page.get_by_role("heading", name="2 warnings")).to_be_visible()
    lines = page.get_by_role("region", name="2 warnings").get_by_role("listitem")
    expect(lines).to_have_text([f"Update 5: {HOSTILE}", "Update 3: all rewards of each group were equal"])
    assert page.locator("main img, main script").count() == 0
    keep(page, "warnings")
    log.clear()


def test_an_action_is_confirmed_first(open_page: Open, buffer: Buffer) -> None:
    buffer.set_state("running")
    page = open_page(f"{LIVE}/actors")
    page.get_by_role("button", name="Checkpoint now").click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("dialog")).to_have_count(0)
    assert buffer.commands.all() == []
    page.get_by_role("button", name="Scale …").click()
    page.get_by_role("spinbutton", name="Rollout actors").fill("3")
    keep(page, "confirm")
    page.get_by_role("dialog").get_by_role("button", name="Scale").click()
    expect(page.get_by_text("requested 3 rollout actors")).to_be_visible()
    assert buffer.desired_actors() == 3


def test_the_read_token_has_no_buttons_to_press(open_page: Open) -> None:
    page = open_page(f"{LIVE}/actors", token=READ)
    expect(page.get_by_text("The read token does not allow actions.")).to_be_visible()
    for button in page.locator(".actions button").all():
        expect(button).to_be_disabled()


def test_an_actor_says_when_it_was_heard_and_what_it_leases(open_page: Open, buffer: Buffer) -> None:
    beat(buffer, LIVE)
    page = open_page(f"{LIVE}/actors")
    row = page.get_by_role("region", name="Rollout actors").get_by_role("row").nth(1)
    expect(row).to_contain_text(re.compile(r"\b\d+ s ago"))
    expect(row).to_contain_text("25 %")
    lease = page.get_by_role("region", name="Leases by holder").get_by_role("row").nth(1)
    expect(lease).to_contain_text(f"{LIVE}-rollout-0")
    expect(lease).to_contain_text(re.compile(r"train 10[01].*\d+(\.\d)? (s|min)"))


def _brightness(page: Any, colour: str) -> float:
    """Mean of the three channels, 0 to 255."""
    channels = re.findall(r"\d+(?:\.\d+)?", page.evaluate(colour))[:3]
    return sum(map(float, channels)) / 3
