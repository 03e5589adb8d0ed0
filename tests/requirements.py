"""Reads the locks in `requirements/`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from packaging.markers import Marker

ROOT = Path(__file__).resolve().parents[1]
_ENTRY = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s;]+)(?: ; ([^\\]+))?")


@dataclass(frozen=True)
class Pin:
    """One entry of a lock: version, when it holds, and the SHA-256 digests of its files."""

    version: str
    marker: Marker | None
    hashes: tuple[str, ...]


def normal(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def lock(name: str) -> dict[str, list[Pin]]:
    """All entries of `requirements/NAME.txt`, by normalised name. AssertionError for a line that is none."""
    found: dict[str, list[Pin]] = {}
    text = "".join(line for line in _file(name).splitlines(keepends=True) if not line.lstrip().startswith("#"))
    for entry in text.replace("\\\n", " ").splitlines():
        head, *hashes = entry.split(" --hash=sha256:")
        match = _ENTRY.fullmatch(head.strip())
        assert match, f"{name}: {entry}"
        marker = Marker(match[3].strip()) if match[3] else None
        pin = Pin(match[2], marker, tuple(digest.strip() for digest in hashes))
        found.setdefault(normal(match[1]), []).append(pin)
    return found


def pins(name: str, python: str = "3.11.7") -> dict[str, str]:
    """Name to version of what a lock installs on Linux (x86-64) with that Python."""
    environment = {
        "python_version": python.rpartition(".")[0],
        "python_full_version": python,
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    return {
        package: pin.version
        for package, entries in lock(name).items()
        for pin in entries
        if pin.marker is None or pin.marker.evaluate(environment)
    }


def _file(name: str) -> str:
    return (ROOT / "requirements" / f"{name}.txt").read_text()
