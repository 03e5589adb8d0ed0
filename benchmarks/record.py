"""What every benchmark's command has: the option `--json`, and a record of figures that names its machine."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil


def parser(description: str) -> argparse.ArgumentParser:
    """A command line with `--json`; see `keep`."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    return made


def keep(figures: Mapping[str, object], file: Path | None) -> None:
    """Write the figures where `--json` asks for it."""
    if file is not None:
        file.write_text(json.dumps(figures, indent=2) + "\n")


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    return {"cores": psutil.cpu_count(), "python": platform.python_version(), "load": psutil.getloadavg()[0]}


def section(figures: Mapping[str, object], key: str) -> dict[str, Any]:
    """The figures below `key`."""
    found = figures[key]
    assert isinstance(found, dict)
    return found
