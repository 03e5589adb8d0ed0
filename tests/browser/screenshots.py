"""Takes the pictures of docs/dashboard.md from a control plane that watches a live run.

    python -m tests.browser.screenshots http://127.0.0.1:8080 RUN [--out docs/images]

The token comes from `ANCHORAGE_CONTROL_READ_TOKEN` or `ANCHORAGE_CONTROL_ADMIN_TOKEN`; with the read token the buttons
are disabled. Writes `dashboard-NAME.png`: the four pages, the list of runs, and the Run page as a phone shows it. Fails
where a page does not come to show what it is for: a picture of an error is no picture.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from services.control.settings import ADMIN_TOKEN_VARIABLE, READ_TOKEN_VARIABLE, token_from
from tests.browser.chromium import CHROMIUM, FLAGS, with_token

PATIENCE_MS = 60_000
WIDE, PHONE = (1280, 900), (390, 844)
DRAWN = "() => document.querySelectorAll('.chart .line, .chart .area').length > 4"
AT_WORK = "() => document.querySelector('[data-heard]') && !document.body.innerText.includes('No ticket is leased')"
SHOTS: dict[str, tuple[str, tuple[int, int], str]] = {
    "run": ("{run}/run", WIDE, DRAWN),
    "trajectories": ("{run}/trajectories", WIDE, "() => document.querySelector('article .step')"),
    "explorer": ("{run}/explorer", WIDE, "() => document.querySelector('.graph .edge')"),
    "actors": ("{run}/actors", WIDE, AT_WORK),
    "runs": ("", WIDE, "() => document.querySelector('main tbody tr')"),
    "phone": ("{run}/run", PHONE, DRAWN),
}
"""Name -> address, width and height, and what must be there."""


def take(url: str, run: str, out: Path, token: str | None) -> list[Path]:
    """Take all pictures. Raises playwright's TimeoutError where a page does not show what it is for."""
    from playwright.sync_api import sync_playwright

    out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            return [_shoot(browser, url, name, run, out, token) for name in SHOTS]
        finally:
            browser.close()


def _shoot(browser: Any, url: str, name: str, run: str, out: Path, token: str | None) -> Path:
    address, (width, height), condition = SHOTS[name]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme="light")
    try:
        if token is not None:
            with_token(context, token)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.goto(f"{url}/#/{address.format(run=run)}")
        page.wait_for_function(condition)
        page.wait_for_timeout(1500)  # what comes by the event stream besides
        picture = out / f"dashboard-{name}.png"
        page.screenshot(path=picture, full_page=name != "phone")
        return picture
    finally:
        context.close()


def main(arguments: Sequence[str] | None = None) -> int:
    summary, _, usage = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        "python -m tests.browser.screenshots",
        description=summary,
        epilog=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("url", help="of the control plane")
    parser.add_argument("run", help="name of the run to look at")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder to write to (docs/images)")
    given = parser.parse_args(arguments)
    if CHROMIUM is None:
        sys.stderr.write("there is no Chromium: install Debian's package chromium\n")
        return 1
    token = token_from(READ_TOKEN_VARIABLE, os.environ) or token_from(ADMIN_TOKEN_VARIABLE, os.environ)
    for picture in take(given.url.rstrip("/"), given.run, given.out, token and token.get_secret_value()):
        sys.stdout.write(f"{picture}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
