"""What this process must know to play a run's environment itself: its registered name, its data, a server's token."""

from __future__ import annotations

import os

from services.config.tree import EnvConfig

TOKEN_VARIABLE = "ANCHORAGE_ENV_TOKEN"


def registered_name(env: EnvConfig) -> str:
    """The name in `env_servers.registry` of the environment with the engine that is asked for."""
    return env.name if env.engine == "native" else f"{env.name}-{env.engine}"


def make_data_known(env: EnvConfig) -> None:
    """Let this process, and servers that it starts from now on, find the data of `env.data`, where it is given."""
    if env.data is not None:
        os.environ[f"{env.name.upper()}_DATA"] = str(env.data)
