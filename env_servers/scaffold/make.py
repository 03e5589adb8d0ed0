"""Copies the template project under a new name.

The template is a working project with the package `my_environment` and the class `MyEnvironment`. Both names are
replaced, in the files and in their paths.
"""

from __future__ import annotations

import keyword
import sys
from pathlib import Path

from env_servers.errors import ServerError

TEMPLATE = Path(__file__).parent / "template"
IGNORED = frozenset({"__pycache__", ".pytest_cache", ".ruff_cache", ".mypy_cache"})


def make_project(name: str, parent: Path) -> Path:
    """Create the project `parent/name` and return its folder. Raises ServerError on an invalid name or folder."""
    _check_name(name)
    folder = parent / name
    if folder.exists():
        raise ServerError(f"folder already exists: {folder}; choose another name, or another folder with --in")
    try:
        for source in sorted(TEMPLATE.rglob("*")):
            relative = source.relative_to(TEMPLATE)
            if source.is_file() and not IGNORED & set(relative.parts):
                target = folder / _renamed(str(relative), name)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(_renamed(source.read_text(), name))
    except OSError as error:
        raise ServerError(f"cannot write {folder}: {error.strerror}") from error
    return folder


def class_name(name: str) -> str:
    """Return the class name: `rock_paper` becomes `RockPaper`."""
    return "".join(part.capitalize() for part in name.split("_"))


def _check_name(name: str) -> None:
    if not name.isidentifier() or not name.isascii() or name != name.lower() or not name.strip("_"):
        raise ServerError(f"invalid package name {name!r}: use lower-case letters, digits and _, such as rock_paper")
    if keyword.iskeyword(name) or name in sys.stdlib_module_names or name in ("env_servers", "tests"):
        raise ServerError(f"the name {name!r} is reserved by Python or by Anchorage: choose another name")


def _renamed(text: str, name: str) -> str:
    return text.replace("my_environment", name).replace("MyEnvironment", class_name(name))
