"""Shared by all benchmark commands: the option `--json`, and a record of figures with a description of the machine."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from env_servers.arguments import writable


def parser(description: str) -> argparse.ArgumentParser:
    """Return a command-line parser with the option `--json`; see `keep`.

    A file that cannot be written is refused before anything is measured.
    """
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--json", type=writable, metavar="FILE", help="also write the figures to this file")
    return made


def keep(figures: Mapping[str, object], file: Path | None) -> None:
    """Write the figures to the file given by `--json`, if any."""
    if file is not None:
        file.write_text(json.dumps(figures, indent=2) + "\n")


def machine() -> dict[str, object]:
    """Return a description of the machine: cores, Python version, load average of the last minute."""
    return {"cores": psutil.cpu_count(), "python": platform.python_version(), "load": psutil.getloadavg()[0]}


def section(figures: Mapping[str, object], key: str) -> dict[str, Any]:
    """Return the figures of one section."""
    found = figures[key]
    assert isinstance(found, dict)
    return found
