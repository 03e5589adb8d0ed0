"""Names of environments, and how a name is resolved to a class."""

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
"""Name → `module:Class`: the built-in environments and those added by `register` in this process."""


def load_environment(name: str, params: Mapping[str, object] | None = None) -> type[Environment]:
    """Return the environment class of a registered name or of `module:Class`. Modules are imported on demand.

    Args:
        name: registered name, or `module:Class`.
        params: parameters to validate and to bind to the class (`with_params`); None: the class as it is.

    Raises:
        ServerError: unknown environment, failed import, not a class derived from `Environment`, or invalid parameters.
    """
    module_name, colon, class_name = ENVIRONMENTS.get(name, name).partition(":")
    if not colon:
        known = ", ".join(sorted(ENVIRONMENTS))
        raise ServerError(f"unknown environment {name!r}: use one of {known}, or module:Class")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        reason = _hidden_package(error) if isinstance(error, ImportError) else None
        raise ServerError(f"cannot load environment {name!r}: {reason or error}") from error
    if not (isinstance(found, type) and issubclass(found, Environment)):
        raise ServerError(f"environment {name!r} is not a class derived from Environment")
    return found if params is None else with_params(found, params)


def _hidden_package(error: ImportError) -> str | None:
    """Return the reason if an import failed because the user's package has the name of one of ours; otherwise None."""
    package = (error.name or "").partition(".")[0]
    ours = Path(__file__).resolve().parents[1]
    if package not in ("anchorage", "services", "actors", "learner"):
        return None
    for folder in {Path(entry).resolve() for entry in sys.path} - {ours}:
        if (folder / package).is_dir() or (folder / f"{package}.py").is_file():
            return (
                f"its package {package!r} in {folder} has the name of one of Anchorage's; rename it, or serve the "
                "environment in a separate process (anchorage env serve) and set env.url"
            )
    return None


def register(name: str, target: str | type[Environment]) -> None:
    """Register an environment under its name, for this process and the servers that its runs start.

    Args:
        name: the name for `env.name`; it must equal the `name` of the class.
        target: the class, or `module:Class`. Another process must be able to import its module, so a class that is
            defined in a script or in a cell of a notebook is rejected.

    Raises:
        ServerError: not an environment class, another `name`, or the name of a different environment.

    Example:
        register("rock_paper", "rock_paper.environment:RockPaper")
    """
    spec = target if isinstance(target, str) else f"{target.__module__}:{target.__qualname__}"
    if ENVIRONMENTS.get(name, spec) != spec:
        raise ServerError(f"environment {name!r} already exists: {ENVIRONMENTS[name]}")
    module = spec.partition(":")[0]
    if module == "__main__":
        raise ServerError(
            f"{spec} is defined in a script or a notebook, which a server cannot import: move the class into a module"
        )
    found = load_environment(spec)
    if found.name != name:
        raise ServerError(f"{spec} has the name {found.name!r}, not {name!r}: register it under its own name")
    ENVIRONMENTS[name] = spec


def import_folder(name: str) -> Path | None:
    """Return the import folder (entry of `sys.path`) of a registered environment's class, or None if it is unknown."""
    module = sys.modules.get(ENVIRONMENTS.get(name, name).partition(":")[0])
    file = getattr(module, "__file__", None)
    if module is None or file is None:
        return None
    depth = module.__name__.count(".") + (Path(file).name == "__init__.py")
    return Path(file).resolve().parents[depth]
