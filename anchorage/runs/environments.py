"""The environments of a run as this process sees them: names, data, token, servers and their `/info`."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from anchorage.runs import event_loop
from env_servers.server.settings import TOKEN_VARIABLE
from services.config.tree import EnvConfig
from services.errors import EnvironmentUnavailable, did_you_mean
from services.plugins import PluginError, make_importable, raised, validated

if TYPE_CHECKING:
    from pydantic import BaseModel

    from env_servers.environment import Environment
    from env_servers.launch import ServerProcess
    from env_servers.protocol import EnvInfo

SAME_EVERYWHERE = ("version", "splits", "source", "fingerprint")
"""Fields of `/info` that the servers of one environment must agree on: then a task is the same on each of them."""


def registered_name(env: EnvConfig) -> str:
    """Return the name in `env_servers.registry` of the environment with the configured engine."""
    return env.name if env.engine == "native" else f"{env.name}-{env.engine}"


def environment_class(env: EnvConfig) -> type[Environment]:
    """Return the class of an environment that a server is started for here, with `env.params`; its data are found.

    Raises:
        EnvironmentUnavailable: no such environment is registered, or it has no tasks; one line for each parameter that
            is invalid.
    """
    from env_servers.environment import TaskError
    from env_servers.errors import ServerError
    from env_servers.registry import ENVIRONMENTS, load_environment

    _register_own(env)
    name = registered_name(env)
    if name not in ENVIRONMENTS:
        own = [known for known in ENVIRONMENTS if "-" not in known]
        raise EnvironmentUnavailable(
            f"env.engine={env.engine}: {env.name} has no such engine"
            if env.name in ENVIRONMENTS
            else f"unknown environment {env.name!r} (env.name){did_you_mean(env.name, own)}; {', '.join(own)} can be "
            "started here: for another one start its server and set env.url"
        )
    try:
        _check_params(env, load_environment(name).Params)
        environment = load_environment(name, env.params)
        environment.splits()
    except (ServerError, PluginError, TaskError, OSError) as error:
        raise EnvironmentUnavailable(str(error)) from None
    return environment


def _check_params(env: EnvConfig, model: type[BaseModel] | None) -> None:
    """Check `env.params` as those of the other plug-ins are: one line for each mistake, with its key.

    Raises:
        PluginError: the environment declares no model, or the parameters do not fit it.
    """
    label = f"env.implementation={env.implementation}" if env.implementation else f"env.name={env.name}"
    if model is not None:
        validated(label, model, env.params, "env.params")
    elif env.params:
        raise PluginError(f"env.params.{min(env.params)}: {label} takes no parameters (its class declares no `Params`)")


def _register_own(env: EnvConfig) -> None:
    """Register the class of `env.implementation`, where it is given, under the environment's name."""
    from env_servers.errors import ServerError
    from env_servers.registry import register

    if env.implementation is None:
        return
    place, _, name = env.implementation.rpartition(":")
    if place.endswith(".py"):
        # As a module of its folder, not as a file: the server's process imports it by that name.
        make_importable([Path(place).parent])
        place = Path(place).stem
    label = f"env.implementation={env.implementation}"
    try:
        register(env.name, f"{place}:{name}")
    except ServerError as error:
        raise EnvironmentUnavailable(f"{label}: {error}") from None
    except Exception as error:
        raise EnvironmentUnavailable(f"{label} cannot be imported: {raised(error)}") from error


def require_playable(env: EnvConfig, environment: type[Environment]) -> None:
    """Play the first two moments of a task of the user's own environment: a reset and a step.

    Raises:
        EnvironmentUnavailable: with the class, and the file and line of what it raised; or what is wrong with what it
            returned; or that it takes longer than `env.request_timeout_s`.
    """
    found: list[str | None] = []
    # A thread of its own that the process does not wait for: an environment may hang.
    playing = threading.Thread(target=lambda: found.append(_first_problem(env, environment)), daemon=True)
    playing.start()
    playing.join(env.request_timeout_s)
    problem = (
        found[0] if found else f"a reset and a step take longer than env.request_timeout_s={env.request_timeout_s:g}"
    )
    if problem is not None:
        raise EnvironmentUnavailable(f"env.implementation={env.implementation}: {problem}")


def _first_problem(env: EnvConfig, environment: type[Environment]) -> str | None:
    """What is wrong with the first reset and step of a task of `env.split`; None: nothing, or no such split."""
    from env_servers.environment import Observation, TaskError
    from env_servers.sessions.session import WrongValue, checked

    if not environment.splits().get(env.split):
        return None
    doing = "its constructor"
    try:
        session = environment()
        try:
            doing = f"reset({env.split!r}, 0)"
            seen = session.reset(env.split, 0)
            for now in range(2):
                if not isinstance(seen, Observation) or not isinstance(seen.text, str):
                    return f"{doing} must return an Observation with a text, got {seen!r:.80}"
                seen.text.encode()
                checked(seen)
                if now == 0 and (seen.terminated or seen.truncated):
                    return f"{doing} ends the episode before the first action"
                if now == 0:
                    action = seen.admissible[0] if seen.admissible else "look"
                    doing = f"step({action!r:.80})"
                    seen = session.step(action)
        finally:
            session.close()
    except (TaskError, WrongValue) as error:
        return f"{doing}: {error}"
    except (Exception, SystemExit) as error:
        return f"{doing}: {raised(error)}"
    return None


def make_data_known(env: EnvConfig) -> None:
    """Set the variable by which this process, and servers that it starts from now on, find the data of `env.data`."""
    if env.data is not None:
        os.environ[f"{env.name.upper()}_DATA"] = str(env.data)


def serve(env: EnvConfig, folder: Path, port: int) -> ServerProcess:
    """Start the environment's server, on a free port where `port` is 0. Its log lies in `folder`.

    Raises:
        EnvironmentUnavailable: the server does not start.
    """
    from env_servers.errors import ServerError
    from env_servers.launch import start_server
    from env_servers.registry import BUILT_IN, ENVIRONMENTS, import_folder

    _register_own(env)
    name = registered_name(env)
    ready = folder / f"{env.name}.url"
    options = ["--port", str(port), "--ready-file", str(ready)]
    if env.params:
        options += ["--params", json.dumps(env.params)]
    command = [sys.executable, "-m", "env_servers", name, *options]
    if name not in BUILT_IN and (folder_of_class := import_folder(name)) is not None:
        path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(folder_of_class))))
        command = ["env", f"PYTHONPATH={path}", sys.executable, "-m", "env_servers", ENVIRONMENTS[name], *options]
    try:
        return start_server(command, ready)
    except ServerError as error:
        raise EnvironmentUnavailable(str(error)) from None


def _info(env: EnvConfig, url: str) -> EnvInfo:
    """Return the server's `/info`.

    Raises:
        EnvironmentUnavailable: it cannot be reached, or serves another environment.
    """
    info = _ask_info(url, env.request_timeout_s)
    if info.name != env.name:
        raise EnvironmentUnavailable(f"the server at {url} serves {info.name}, not {env.name} (env.name)")
    return info


def info_of(env: EnvConfig, urls: Sequence[str]) -> EnvInfo:
    """Return the `/info` of the first server of an environment, which all of `urls` agree with.

    Raises:
        EnvironmentUnavailable: a server cannot be reached, or they serve different tasks.
    """
    first, *others = [_info(env, url) for url in urls]
    for url, other in zip(urls[1:], others, strict=True):
        for field in SAME_EVERYWHERE:
            here, there = getattr(first, field), getattr(other, field)
            if here != there:
                raise EnvironmentUnavailable(
                    f"the servers of {env.name} differ: {field} is {here!r} at {urls[0]} and {there!r} at {url}; "
                    "a task must be the same everywhere: give them the same release, data and settings (env.urls)"
                )
    return first


def _ask_info(url: str, timeout_s: float) -> EnvInfo:
    from env_servers.client import EnvironmentUnavailableError, RequestRejected, open_client

    async def ask() -> EnvInfo:
        client = open_client(url, token=os.environ.get(TOKEN_VARIABLE), timeout_s=timeout_s, patience_s=5.0)
        try:
            return await client.info()
        finally:
            await client.close()

    try:
        return event_loop.run(ask())
    except (EnvironmentUnavailableError, RequestRejected) as error:
        raise EnvironmentUnavailable(f"no environment server at {url}: {error}") from None
