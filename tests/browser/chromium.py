"""What the browser tests and the screenshots share: how Chromium is started, and what is wrong with a page."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def with_token(context: Any, token: str) -> None:
    """Pages of the context have the token from their start."""
    context.add_init_script(f"sessionStorage.setItem('anchorage-token', '{token}')")


def unlabelled(page: Any) -> list[str]:
    """Controls without a name, and pictures without a text. A list's options are no name of it."""
    found: list[str] = page.evaluate(
        """() => [...document.querySelectorAll('button, input, select, textarea, a, img, [role=img], [role=button]')]
            .filter((one) => {
                const isField = one.matches('input, select, textarea');
                const text = isField ? '' : one.textContent.trim();
                const labels = [...(one.labels ?? [])].some((label) => {
                    const bare = label.cloneNode(true);
                    bare.querySelectorAll('input, select, textarea').forEach((field) => field.remove());
                    return bare.textContent.trim();
                });
                return !(one.getAttribute('aria-label') || text || labels || one.hasAttribute('alt'));
            })
            .map((one) => one.outerHTML.slice(0, 120))"""
    )
    return found


def keep(page: Any, name: str) -> None:
    """Keep a picture of the page in the folder that `DASHBOARD_SCREENSHOTS` names, where it does."""
    folder = os.environ.get("DASHBOARD_SCREENSHOTS")
    if folder:
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)
