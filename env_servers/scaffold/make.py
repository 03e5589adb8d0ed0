"""Copies the template project under a new name.

The template is a working project whose package is `my_environment` and whose class is `MyEnvironment`; the new one has
these names replaced, in files and in their paths.
"""

from __future__ import annotations

import keyword
import sys
from pathlib import Path

from env_servers.errors import ServerError

TEMPLATE = Path(__file__).parent / "template"
LEFT_OUT = frozenset({"__pycache__", ".pytest_cache", ".ruff_cache", ".mypy_cache"})


def make_project(name: str, parent: Path) -> Path:
    """Make the folder `parent/name`. Raises ServerError where the name or the folder cannot be used."""
    _check_name(name)
    folder = parent / name
    if folder.exists():
        raise ServerError(f"{folder} is there already: choose another name, or --in another folder")
    try:
        for source in sorted(TEMPLATE.rglob("*")):
            relative = source.relative_to(TEMPLATE)
            if source.is_file() and not LEFT_OUT & set(relative.parts):
                target = folder / _renamed(str(relative), name)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(_renamed(source.read_text(), name))
    except OSError as error:
        raise ServerError(f"{folder} cannot be written: {error.strerror}") from error
    return folder


def class_name(name: str) -> str:
    """`rock_paper` becomes `RockPaper`."""
    return "".join(part.capitalize() for part in name.split("_"))


def _check_name(name: str) -> None:
    if not name.isidentifier() or not name.isascii() or name != name.lower() or not name.strip("_"):
        raise ServerError(f"{name!r} is no name of a package: use lower-case letters, digits and _, like rock_paper")
    if keyword.iskeyword(name) or name in sys.stdlib_module_names or name in ("env_servers", "tests"):
        raise ServerError(f"the name {name!r} is taken by Python or by this project: choose another")


def _renamed(text: str, name: str) -> str:
    return text.replace("my_environment", name).replace("MyEnvironment", class_name(name))
