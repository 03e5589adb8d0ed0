"""Folders of official data, as a user's environment names them, for the tests that want these data.

The variables themselves are hidden from all tests: without them the environments generate what they serve, which most
tests count on. Workers of pytest-xdist inherit the hidden values.
"""

from __future__ import annotations

import os
from pathlib import Path

VARIABLES = ("ALFWORLD_DATA", "WEBSHOP_DATA")


def hide() -> None:
    """Take the variables out of this process's environment. Idempotent."""
    for name in VARIABLES:
        if folder := os.environ.pop(name, None):
            os.environ[_hidden(name)] = folder


def folder_of(variable: str) -> Path | None:
    """The folder that the variable named before it was hidden; None without one."""
    folder = os.environ.get(_hidden(variable))
    return Path(folder) if folder else None


def _hidden(variable: str) -> str:
    return f"TEST_{variable}"
