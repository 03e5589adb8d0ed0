"""The table and the JSON file.

Invariants
- What may name the machine or its user does not leave it: host name, user name, addresses and folders are replaced.
"""

from __future__ import annotations

import datetime
import getpass
import json
import os
import platform
import re
import socket
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.gpu_check.rows import Row, Value

FORMAT = 1
"""Version of the file's form."""
_ADDRESS = re.compile(r"\b(?!127\.0\.0\.1\b)(?:\d{1,3}\.){3}\d{1,3}\b")
_CARD = re.compile(r"\b(GPU|MIG)-[0-9a-f]{8}-[0-9a-f-]+")
_FOLDER = re.compile(r"(?<![\w.])/(?:home|root|Users|tmp|var|work|mnt|data|scratch|opt|app)(?:/[^\s:'\",)\]]*)?")
_COMMON = ("root", "localhost")
_COLOURS = {"ok": "green", "failed": "bold red", "skipped": "yellow", "measured": "cyan"}


def scrub(text: str) -> str:
    """Replace what names the machine, its user, its network and its folders.

    Example: `/home/ann/x/model.py on gpu7 (10.0.0.4)` on the host gpu7 becomes `PATH/model.py on HOST (ADDRESS)`.
    """
    text = _FOLDER.sub(lambda found: f"PATH/{Path(found[0]).name}", text)
    for name, put in ((socket.gethostname(), "HOST"), (_user(), "USER")):
        if len(name) > 2 and name not in _COMMON:
            text = re.sub(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", put, text)
    return _CARD.sub(r"\1-UUID", _ADDRESS.sub("ADDRESS", text))


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        return ""


def facts(dry: bool) -> dict[str, object]:
    """What is known of the program and the machine without any check."""
    return {
        "format": FORMAT,
        "anchorage": _version("anchorage-rl"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "dry": dry,
        "machine": {
            "system": platform.system(),
            "kernel": platform.release(),
            "architecture": platform.machine(),
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        },
    }


def document(known: dict[str, object], rows: Sequence[tuple[str, Row]], seconds: dict[str, float]) -> str:
    """The JSON file.

    Args:
        known: of `facts`.
        rows: each with its group.
        seconds: that each group took.
    """
    counted = {verdict: sum(row.verdict == verdict for _, row in rows) for verdict in _COLOURS}
    whole: dict[str, Any] = known | {
        "verdicts": counted,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "rows": [{"group": group, **row.record()} for group, row in rows],
    }
    return json.dumps(_scrubbed(whole), indent=2, allow_nan=False) + "\n"


def _scrubbed(value: Any) -> Any:
    if isinstance(value, str):
        return scrub(value)
    if isinstance(value, dict):
        return {key: _scrubbed(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_scrubbed(inner) for inner in value]
    # JSON has no NaN.
    return str(value) if isinstance(value, float) and value - value != 0 else value


def show(rows: Iterable[tuple[str, Row]], console: Console) -> None:
    """Print the table."""
    table = Table("group", "check", "value", "verdict", "bound or reason", expand=False)
    before = None
    for group, row in rows:
        if group != before and before is not None:
            table.add_section()
        verdict = Text(row.verdict, style=_COLOURS[row.verdict])
        table.add_row(group if group != before else "", row.name, shown(row.value), verdict, row.reason)
        before = group
    console.print(table)


def shown(value: Value) -> str:
    """A value as a person reads it: four significant digits."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else value


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
