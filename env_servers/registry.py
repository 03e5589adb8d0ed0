"""Names of the environments that come with the project, and how a name becomes a class."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path

from env_servers.environment import Environment
from env_servers.errors import ServerError
from env_servers.parameters import with_params

BUILT_IN = {
    "alfworld": "env_servers.alfworld.environment:AlfWorld",
    "alfworld-textworld": "env_servers.alfworld.textworld_engine:TextWorldAlfWorld",
    "webshop": "env_servers.webshop.environment:WebShop",
}
ENVIRONMENTS = dict(BUILT_IN)
"""Name -> `module:Class`: the built-in environments, and those that `register` added in this process."""


def load_environment(name: str, params: Mapping[str, object] | None = None) -> type[Environment]:
    """The environment class of a registered name or of `module:Class`. Nothing is imported before it is asked for.

    Args:
        name: registered name, or `module:Class`.
        params: parameters to validate and to bind to the class (`with_params`); None: the class as it is.

    Raises:
        ServerError: no such environment, it is not an `Environment`, or the parameters are invalid.
    """
    module_name, colon, class_name = ENVIRONMENTS.get(name, name).partition(":")
    if not colon:
        known = ", ".join(sorted(ENVIRONMENTS))
        raise ServerError(f"no environment is called {name!r}: name one of {known}, or module:Class")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        reason = _hidden_package(error) if isinstance(error, ImportError) else None
        raise ServerError(f"environment {name!r} cannot be loaded: {reason or error}") from error
    if not (isinstance(found, type) and issubclass(found, Environment)):
        raise ServerError(f"environment {name!r} is no class derived from Environment")
    return found if params is None else with_params(found, params)


def _hidden_package(error: ImportError) -> str | None:
    """Say that a package of the project has the name of one of ours, where that is why an import failed."""
    package = (error.name or "").partition(".")[0]
    ours = Path(__file__).resolve().parents[1]
    if package not in ("anchorage", "services", "actors", "learner"):
        return None
    for folder in {Path(entry).resolve() for entry in sys.path} - {ours}:
        if (folder / package).is_dir() or (folder / f"{package}.py").is_file():
            return (
                f"its package {package!r} in {folder} has the name of one of Anchorage's; rename it, or serve the "
                "environment in a process of its own (anchorage env serve) and set env.url"
            )
    return None


def register(name: str, target: str | type[Environment]) -> None:
    """Make an environment known by its name in this process, and to the servers that runs start from here.

    Args:
        name: as in `env.name`; the class must have it as its `name`.
        target: the class, or `module:Class`. Its module must be importable by another process: a class of a script or
            of a notebook's cell is not.

    Raises:
        ServerError: it is not such a class, has another name, or the name is that of a built-in environment.

    Example:
        register("rock_paper", "rock_paper.environment:RockPaper")
    """
    spec = target if isinstance(target, str) else f"{target.__module__}:{target.__qualname__}"
    if ENVIRONMENTS.get(name, spec) != spec:
        raise ServerError(f"an environment called {name!r} exists already: {ENVIRONMENTS[name]}")
    module = spec.partition(":")[0]
    if module == "__main__":
        raise ServerError(
            f"{spec} is defined in a script or a notebook, which its server cannot import: move the class into a module"
        )
    found = load_environment(spec)
    if found.name != name:
        raise ServerError(f"{spec} is called {found.name!r}, not {name!r}: register it by its name")
    ENVIRONMENTS[name] = spec


def import_folder(name: str) -> Path | None:
    """Return the folder on whose import path the class of a registered environment lies; None where that is unknown."""
    module = sys.modules.get(ENVIRONMENTS.get(name, name).partition(":")[0])
    file = getattr(module, "__file__", None)
    if module is None or file is None:
        return None
    depth = module.__name__.count(".") + (Path(file).name == "__init__.py")
    return Path(file).resolve().parents[depth]
