"""Reads a recipe and applies `key=value` overrides; every mistake is one line that names the key.

Overrides are YAML values at dotted paths (`learner.groups_per_update=8`, `env.url=null`). A recipe may begin with
`extends: other.yaml` (relative to itself); what it says itself wins.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from services.config.masking import masked
from services.config.tree import Config
from services.errors import AnchorageError


class ConfigError(AnchorageError):
    """The configuration is wrong; the message is one line for the user."""


def load_config(recipe: Path | None, overrides: Sequence[str] = ()) -> Config:
    """The recipe's tree with the overrides applied.

    Raises:
        ConfigError: missing or broken recipe, malformed override, unknown key, or a value out of range.
    """
    return _validated(_read(recipe) if recipe is not None else {}, overrides)


def parse_config(text: str, overrides: Sequence[str] = ()) -> Config:
    """The tree that `dump_config` wrote, with the overrides applied.

    Raises:
        ConfigError: as `load_config`.
    """
    return _validated(yaml.safe_load(text), overrides)


def dump_config(config: Config) -> str:
    """The whole tree as YAML, defaults included and credentials too: for the run's own folder."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def portable_config(config: Config) -> str:
    """The same for another machine: without addresses, folders and credentials, which are this one's."""
    here = {"url": True, "urls": True, "data": True}
    tree = config.model_dump(
        mode="json",
        exclude={
            "run": {"dir"},
            "model": {"path"},
            "env": here,
            "envs": {"__all__": here},
            "buffer": {"redis_url"},
            "weights": {"directory"},
        },
    )
    return yaml.safe_dump(masked(tree), sort_keys=False)


def shown_config(config: Config) -> str:
    """The same for people to read: no credential in it."""
    return yaml.safe_dump(masked(config.model_dump(mode="json")), sort_keys=False)


def _validated(tree: dict[str, Any], overrides: Sequence[str]) -> Config:
    for override in overrides:
        _apply(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_one_line(error)) from None


def _read(recipe: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(recipe.read_text()) or {}
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {recipe}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{recipe} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{recipe} must hold a mapping of sections")
    base = tree.pop("extends", None)
    if base is None:
        return tree
    parent = (recipe.parent / str(base)).resolve()
    if parent in seen:
        raise ConfigError(f"{recipe} extends itself")
    return _merge(_read(parent, (*seen, recipe.resolve())), tree)


def _merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"'{override}' is not an override; write key=value, as in learner.updates=50")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"'{text}' is not a YAML value (override '{override}')") from None
    if isinstance(value, str):
        # YAML 1.1 reads 1e-4 as a string; pydantic would refuse it in some places and coerce it in others.
        with contextlib.suppress(ValueError):
            value = float(value)
    *parents, leaf = path.split(".")
    node = tree
    for name in parents:
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            raise ConfigError(f"'{override}': {name} is a value, not a section")
    node[leaf] = value


def _one_line(error: ValidationError) -> str:
    first, *rest = error.errors()
    key = ".".join(str(part) for part in first["loc"]) or "configuration"
    if first["type"] == "extra_forbidden":
        text = f"unknown configuration key '{key}'"
    else:
        text = f"configuration key '{key}': {first['msg']}, got {masked(first['input'])!r}"[:400]
    return text + (f" (and {len(rest)} more)" if rest else "")
