"""Write metadata.json: what each release in the locks requires of others and of Python. Part of `make lock`.

`tests/test_lock_metadata.py` checks the locks against it, without a network. Metadata of releases that are installed
here come from the installation, those of others from the index through pip, which reads a few kB of each wheel.

Example: one entry. Requirements of extras that nobody asks for are left out.

    "aiosignal==1.4.0": {"python": ">=3.9", "requires": ["frozenlist>=1.1.0", "typing-extensions>=4.2; …"]}
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Collection, Mapping, Sequence
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement

from tests.requirements import PYTHONS, ROOT, normal, pins

HERE = ROOT / "requirements"
FILE = HERE / "metadata.json"
INDEX = "https://pypi.org/simple"
APART = {"openenv-0.3", "openenv-0.10"}
"""Locks that list what a few programs import, and no more: they are incomplete on purpose."""
Entry = dict[str, Any]


def main() -> None:
    locks = [path.stem for path in HERE.glob("*.txt") if path.stem not in APART]
    wanted = {
        f"{name}=={version}" for lock in locks for python in PYTHONS for name, version in pins(lock, python).items()
    }
    known: dict[str, Entry] = json.loads(FILE.read_text()) if FILE.exists() else {}
    found = {pin: known[pin] for pin in wanted & known.keys()}
    found |= {pin: entry for pin in wanted if (entry := _installed(pin)) is not None}
    found |= _from_index(sorted(wanted - found.keys()))
    FILE.write_text(json.dumps(_trimmed(found), indent=1, sort_keys=True) + "\n")
    print(f"{FILE.relative_to(ROOT)}: {len(found)} releases")


def _installed(pin: str) -> Entry | None:
    name, _, version = pin.partition("==")
    try:
        there = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
    if there.version != version:  # such as torch's CPU build, whose version ends in +cpu
        return None
    return {"python": there.metadata["Requires-Python"], "requires": list(there.requires or ())}


def _from_index(releases: Sequence[str]) -> dict[str, Entry]:
    """Let pip read the metadata of these releases; nothing is installed."""
    if not releases:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        report = f"{folder}/report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--index-url", INDEX, "--no-deps", "--dry-run"]
        command += ["--ignore-installed", "--use-feature", "fast-deps", "--report", report, *releases]
        subprocess.run(command, check=True)
        with open(report) as file:
            read = [item["metadata"] for item in json.load(file)["install"]]
    return {
        f"{normal(one['name'])}=={one['version']}": {
            "python": one.get("requires_python"),
            "requires": one.get("requires_dist", []),
        }
        for one in read
    }


def _trimmed(found: Mapping[str, Entry]) -> dict[str, Entry]:
    """Leave out requirements of extras that neither a release nor this project asks for."""
    parsed = {pin: [Requirement(text) for text in entry["requires"]] for pin, entry in found.items()}
    everything = [*_own(), *(one for requires in parsed.values() for one in requires)]
    asked = {(normal(one.name), extra) for one in everything for extra in one.extras}
    return {
        pin: {
            "python": found[pin]["python"],
            "requires": sorted(
                str(one) for one in requires if _counts(one, {e for name, e in asked if name == pin.partition("==")[0]})
            ),
        }
        for pin, requires in parsed.items()
    }


def _own() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [*project["dependencies"], *(one for group in project["optional-dependencies"].values() for one in group)]
    lines = [line.partition(" #")[0] for path in HERE.glob("*.in") for line in path.read_text().splitlines()]
    return [Requirement(text) for text in [*listed, *lines] if text and not text.startswith("#")]


def _counts(requirement: Requirement, extras: Collection[str]) -> bool:
    marker = str(requirement.marker or "")
    return "extra ==" not in marker or any(f'extra == "{extra}"' in marker for extra in extras)


if __name__ == "__main__":
    main()
