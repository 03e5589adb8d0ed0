"""Parameters of an environment: validated by the model that its class declares, and bound to a subclass of it.

Invariants
- Equal parameters give the same class, so what an environment caches by its class is computed once in a process.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache

from pydantic import BaseModel, ValidationError

from env_servers.environment import Environment
from env_servers.errors import ServerError, summary


def with_params(environment: type[Environment], params: Mapping[str, object]) -> type[Environment]:
    """Return the environment with these parameters: a subclass whose `params` is the validated model.

    Without parameters it is the class itself, unless its model requires some.

    Args:
        environment: the class; its `Params` is the model.
        params: plain data, as JSON can hold it.

    Raises:
        ServerError: it takes no parameters or has no such one, a value is invalid, or a required one is missing.

    Example:
        with_params(Maze, {"size": 5}).params.size == 5
    """
    model = environment.Params
    if model is None and params:
        given = ", ".join(params)
        raise ServerError(
            f"environment {environment.name} takes no parameters (its class declares no `Params`), got {given}"
        )
    if model is None or (not params and isinstance(getattr(environment, "params", None), model)):
        return environment
    _require_known(environment.name, model, params)
    try:
        return _bound(environment, json.dumps(params, sort_keys=True))
    except ValidationError as error:
        raise ServerError(f"invalid parameters of environment {environment.name}: {summary(error)}") from None


def _require_known(name: str, model: type[BaseModel], params: Mapping[str, object]) -> None:
    """Refuse parameters that the model would ignore."""
    known = {*model.model_fields, *(field.alias for field in model.model_fields.values() if field.alias)}
    unknown = [key for key in params if key not in known]
    if not unknown or model.model_config.get("extra") == "allow":
        return
    close = get_close_matches(unknown[0], known, n=1)
    hint = f", did you mean {close[0]}?" if close else ""
    raise ServerError(f"environment {name} has no parameter {unknown[0]!r}{hint}")


@cache
def _bound(environment: type[Environment], params: str) -> type[Environment]:
    """The subclass of an environment for these parameters, which are JSON: a key that can be hashed."""
    assert environment.Params is not None
    value = environment.Params.model_validate(json.loads(params))
    copied = {name: getattr(environment, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(environment.__name__, (environment,), {**copied, "params": value})
