"""References to plug-ins in the configuration: a built-in name, `module:name`, or `file.py:name`.

Invariants
- Files in a loaded configuration are absolute paths. A relative path is relative to the recipe that contains it, on the
  command line to the working directory.
- Modules that are not installed are searched in `plugins.folders`: the folders of the recipes, and the working
  directory. Since they are in the configuration, every process and a resumed run search the same folders.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from services.config import mistakes
from services.config.section import Section
from services.errors import did_you_mean

Tree = dict[str, Any]

REFERENCE_PATTERN = r"^.+:[A-Za-z_][A-Za-z0-9_]*$"
"""Pattern of a plug-in reference in the JSON schema; `is_reference` is stricter."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Annotation of a text that is one of `names` or a plug-in reference: `Annotated[str, Choice(("a", "b"))]`."""

    names: tuple[str, ...] = ()

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        reference = {"type": "string", "pattern": REFERENCE_PATTERN}
        return {"anyOf": [{"enum": [*self.names]}, reference]} if self.names else reference

    def _check(self, value: object) -> object:
        if isinstance(value, str) and (value in self.names or is_reference(value)):
            return value
        text = value if isinstance(value, str) else ""
        if ":" in text or not self.names:
            rule = "must be module:name or file.py:name, such as my_package.advantages:mine or ./mine.py:mine"
        else:
            rule = f"must be one of {', '.join(self.names)}, or a plug-in as module:name"
        hint = did_you_mean(text, self.names)
        raise PydanticCustomError("choice", "{text}", {"text": f"{rule}, got {mistakes.shown('', value)}{hint}"})


class PluginsConfig(Section):
    folders: tuple[Path, ...] = ()
    """Folders that are searched for plug-in modules that are not installed. Empty: the folders of the recipes and the
    working directory, if the configuration names a plug-in."""


def is_reference(text: str) -> bool:
    """Return whether a value is a plug-in reference, not a built-in name.

    Example: `my_package.advantages:mine` and `./mine.py:mine` are, `gigpo` is not.
    """
    place, colon, name = text.rpartition(":")
    if not colon or not name.isidentifier():
        return False
    return place.endswith(".py") or all(part.isidentifier() for part in place.split("."))


def absolute(reference: str, folder: Path) -> str:
    """Return the reference with its file, if any, as an absolute path. A relative path is relative to `folder`."""
    path, _, name = reference.rpartition(":")
    if not path.endswith(".py"):
        return reference
    return f"{(folder / Path(path).expanduser()).resolve()}:{name}"


def anchor(tree: Tree, folder: Path) -> None:
    """Make the files of all references in a tree of plain data absolute. Changes the tree."""
    _each(tree, lambda value: absolute(value, folder))
    agent = _section(tree, ["agent"])
    if agent is not None and isinstance(agent.get("command"), list | tuple):
        agent["command"] = [_absolute_file(one, folder) for one in agent["command"]]


def _absolute_file(argument: object, folder: Path) -> object:
    """A member of a command: the absolute path of a script, or of a file that exists in the recipe's folder.

    Links to programs are not followed: the interpreter of a virtual environment is one, and finds its packages by its
    own path.
    """
    if not isinstance(argument, str) or not argument or argument.startswith("-") or Path(argument).is_absolute():
        return argument
    path = folder / argument
    if argument.endswith(".py"):
        return str(path.resolve())
    return os.path.abspath(path) if "/" in argument and path.is_file() else argument


def add_folders(tree: Tree, folders: Iterable[Path]) -> None:
    """Set `plugins.folders` of a tree of plain data that references a plug-in and sets no folders. Changes the tree."""
    found: list[str] = []

    def note(value: str) -> str:
        if is_reference(value):
            found.append(value)
        return value

    _each(tree, note)
    section = tree.setdefault("plugins", {}) if found else None
    if isinstance(section, dict) and not section.get("folders"):
        section["folders"] = [*dict.fromkeys(map(str, folders))]


PLACES = (
    ("algorithm",),
    *(("prompt", name) for name in ("template", "parser", "reader", "memory")),
    ("agent", "reader"),
    ("loss", "function"),
)
"""Keys of the tree whose value may be a reference. `LISTS` are those whose value is a list of them."""
LISTS = (("telemetry", "trackers"),)


def _each(tree: Tree, change: Callable[[str], str]) -> None:
    """Apply `change` to each text that may be a reference. The tree is not validated yet: any value may be invalid."""
    for *above, last in PLACES:
        section = _section(tree, above)
        if section is not None and isinstance(section.get(last), str):
            section[last] = change(section[last])
    for *above, last in LISTS:
        section = _section(tree, above)
        if section is not None and isinstance(section.get(last), list | tuple):
            section[last] = [change(one) if isinstance(one, str) else one for one in section[last]]
    environments = [tree.get("env"), *(tree["envs"] if isinstance(tree.get("envs"), list | tuple) else ())]
    for env in environments:
        if isinstance(env, dict) and isinstance(env.get("implementation"), str):
            env["implementation"] = change(env["implementation"])


def _section(tree: Tree, path: list[str]) -> Tree | None:
    section: Any = tree
    for name in path:
        section = section.get(name) if isinstance(section, Mapping) else None
    return section if isinstance(section, dict) else None
