"""A control plane over a finished and a live run, and a real headless Chromium to look at it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests import needs
from tests.browser.chromium import CHROMIUM, FLAGS, with_token
from tests.control_server import ADMIN, buffer, folder, url

__all__ = ["buffer", "folder", "url"]

PATIENCE_MS = int(os.environ.get("BROWSER_PATIENCE_MS", "60000"))
"""A busy machine is no failure."""


@pytest.fixture(scope="module")  # while Playwright runs, no test of another module could run a loop of its own
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip(needs.CHROMIUM)
    playwright = pytest.importorskip("playwright.sync_api", reason=needs.PLAYWRIGHT)
    playwright.expect.set_options(timeout=PATIENCE_MS)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any, request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Opens an address of the dashboard; afterwards nothing may have gone wrong in any page.

    `allowed` are words of what the browser may complain of: a refused token, a server that is away.
    """
    troubles: list[str] = []
    contexts = []
    allowed = ["401", "403"]  # Chromium logs the statuses; the pages say them too

    def open_(
        address: str,
        token: str | None = ADMIN,
        *,
        width: int = 1280,
        scheme: str = "light",
        script: str | None = None,
        at: str | None = None,
        allow: str | None = None,
    ) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("console", lambda message: message.type in ("error", "warning") and troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        if token is not None:
            with_token(context, token)
        if script is not None:
            context.add_init_script(script)
        if allow is not None:
            allowed.append(allow)
        page.goto(f"{at or request.getfixturevalue('url')}/#/{address}")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert [trouble for trouble in troubles if not any(word in trouble for word in allowed)] == []
