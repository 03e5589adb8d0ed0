"""Reads the locks in `requirements/`, and finds what a set of releases lacks by the metadata of each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11.2", "3.11.7", "3.12.1", "3.13.0")
"""Patch releases too, since some need more packages than others."""
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
    for entry in text.replace("\\\n", " ").split("\n"):
        if not entry.strip():
            continue
        head, *hashes = entry.split(" --hash=sha256:")
        match = _ENTRY.fullmatch(head.strip())
        assert match, f"{name}: {entry}"
        marker = Marker(match[3].strip()) if match[3] else None
        pin = Pin(match[2], marker, tuple(digest.strip() for digest in hashes))
        found.setdefault(normal(match[1]), []).append(pin)
    return found


def pins(name: str, python: str = "3.11.7") -> dict[str, str]:
    """Name to version of what a lock installs on Linux (x86-64) with that Python."""
    environment = _environment(python)
    return {
        package: pin.version
        for package, entries in lock(name).items()
        for pin in entries
        if pin.marker is None or pin.marker.evaluate(environment)
    }


def without(name: str) -> dict[str, str]:
    """Packages that `requirements/NAME.in` leaves out of the locks: normalised name to the reason."""
    lines = (ROOT / "requirements" / f"{name}.in").read_text().splitlines()
    entries = (line.partition("  # ") for line in lines if line and not line.startswith("#"))
    return {normal(package): reason for package, _, reason in entries}


@dataclass(frozen=True)
class Unmet:
    """A requirement that a set of releases does not meet.

    Attributes:
        package: that requires it.
        requirement: name of the required package, or `python`.
        line: what is wrong, for a reader.
    """

    package: str
    requirement: str
    line: str


def unmet(versions: Mapping[str, str], python: str, known: Mapping[str, Mapping[str, Any]]) -> Iterator[Unmet]:
    """Find the requirements that releases do not meet which are installed together.

    Args:
        versions: by normalised name.
        python: full version.
        known: metadata by `name==version`: `python` (specifier or None) and `requires` (list).

    Example:

        >>> known = {"a==1": {"python": ">=3.11", "requires": ["b>=2"]}, "b==1": {"python": None, "requires": []}}
        >>> [one.line for one in unmet({"a": "1", "b": "1"}, "3.11.7", known)]
        ['a 1 requires b>=2, and 1 is locked']
    """
    environment = _environment(python)
    extras: set[tuple[str, str]] = set()

    def active(package: str, requirement: Requirement) -> bool:
        marker, mine = requirement.marker, {extra for name, extra in extras if name == package}
        return marker is None or any(marker.evaluate({**environment, "extra": extra}) for extra in {"", *mine})

    def required() -> list[tuple[str, Requirement]]:
        listed = (
            (package, Requirement(text))
            for package, version in versions.items()
            for text in known.get(f"{package}=={version}", {}).get("requires", ())
        )
        return [(package, requirement) for package, requirement in listed if active(package, requirement)]

    # A requirement of an extra may itself ask for extras.
    while more := {(normal(one.name), extra) for _, one in required() for extra in one.extras} - extras:
        extras |= more
    for package, version in versions.items():
        entry = known.get(f"{package}=={version}")
        if entry is None:
            yield Unmet(package, "", f"requirements/metadata.json lacks {package} {version}: run make lock")
        elif not SpecifierSet(entry["python"] or "").contains(python):
            yield Unmet(package, "python", f"{package} {version} requires Python {entry['python']}, not {python}")
    for package, requirement in required():
        there = versions.get(normal(requirement.name))
        if there is None or not requirement.specifier.contains(there, prereleases=True):
            locked = "and it is in no lock" if there is None else f"and {there} is locked"
            wrong = f"{package} {versions[package]} requires {requirement}, {locked}"
            yield Unmet(package, normal(requirement.name), wrong)


def _environment(python: str) -> dict[str, str]:
    return {
        "python_version": python.rpartition(".")[0],
        "python_full_version": python,
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }


def _file(name: str) -> str:
    return (ROOT / "requirements" / f"{name}.txt").read_text()
