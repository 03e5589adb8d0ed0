"""Names of the environments that come with the project, and how a name becomes a class."""

from __future__ import annotations

import importlib

from env_servers.environment import Environment
from env_servers.errors import ServerError

ENVIRONMENTS = {
    "alfworld": "env_servers.alfworld.environment:AlfWorld",
    "alfworld-textworld": "env_servers.alfworld.textworld_engine:TextWorldAlfWorld",
    "webshop": "env_servers.webshop.environment:WebShop",
}


def load_environment(name: str) -> type[Environment]:
    """The environment class of a registered name or of `module:Class`. Nothing is imported before it is asked for.

    Raises:
        ServerError: no such environment, or it is not an `Environment`.
    """
    module_name, colon, class_name = ENVIRONMENTS.get(name, name).partition(":")
    if not colon:
        known = ", ".join(sorted(ENVIRONMENTS))
        raise ServerError(f"no environment is called {name!r}: name one of {known}, or module:Class")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ServerError(f"environment {name!r} cannot be loaded: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Environment)):
        raise ServerError(f"environment {name!r} is no class derived from Environment")
    return found
