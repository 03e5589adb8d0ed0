"""Load a recipe and apply `key=value` overrides. All mistakes are reported at once, one line each, the key first.

Overrides are YAML values at dotted paths (`learner.groups_per_update=8`, `env.url=null`). A recipe may begin with
`extends: other.yaml` (relative to itself, or one that comes with the project); its own values take precedence.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from services import packaged
from services.config import mistakes, recipe_yaml, references
from services.config.masking import masked
from services.config.tree import Config
from services.errors import AnchorageError, did_you_mean


class ConfigError(AnchorageError):
    """The configuration is invalid; the message has one line for each mistake."""


Override = str | Mapping[str, Any]
"""`key=value`, or a mapping from dotted keys to values or sections."""


def load_config(recipe: Path | Mapping[str, Any] | None, overrides: Sequence[Override] = ()) -> Config:
    """Return the configuration of a recipe with the overrides applied. A mapping is the tree itself.

    `recipe` may be the bare name of a recipe in `configs`, such as `demo`; if no such file exists, the packaged recipe
    is used. In the same way `model.path` is a packaged policy if the working directory has no such folder.

    Raises:
        ConfigError: missing or invalid recipe, malformed overrides, unknown keys, or invalid values.

    Example:
        load_config(Path("configs/demo.yaml"), ["learner.updates=20", {"run.seed": 3}]).learner.updates  # 20
    """
    if isinstance(recipe, Mapping):
        return _validated(copy.deepcopy(dict(recipe)), overrides)
    folders: list[Path] = []
    tree = _read(packaged.find_recipe(recipe), folders) if recipe is not None else {}
    return _validated(tree, overrides, folders)


def parse_config(text: str, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration that `dump_config` wrote, with the overrides applied.

    Raises:
        ConfigError: as `load_config`.
    """
    return _validated(_mapping(text, "the configuration"), overrides)


def dump_config(config: Config) -> str:
    """Return the whole tree as YAML, including defaults and credentials: for the run's own folder."""
    return recipe_yaml.dump(config.model_dump(mode="json"))


def portable_config(config: Config) -> str:
    """Return the tree as YAML for another machine: without this machine's addresses, folders and credentials."""
    return recipe_yaml.dump(portable_tree(config))


def portable_tree(config: Config) -> dict[str, Any]:
    """Return the tree of `portable_config` as plain data."""
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
            "plugins": True,
        },
    )
    shown: dict[str, Any] = masked(tree)
    return shown


def shown_config(config: Config) -> str:
    """Return the whole tree as YAML, with credentials masked."""
    return recipe_yaml.dump(masked(config.model_dump(mode="json")))


def _validated(tree: dict[str, Any], overrides: Sequence[Override], folders: Sequence[Path] = ()) -> Config:
    """Return the validated tree. `folders` are those of the recipes, in which plug-in modules are searched."""
    found = [problem for override in overrides for problem in _apply(tree, override)]
    references.anchor(tree, Path.cwd())
    references.add_folders(tree, [*folders, Path.cwd()])
    found += _mistakes(tree)
    if found:
        raise ConfigError("\n".join(dict.fromkeys(found)))
    config = Config.model_validate(tree)
    model = packaged.find(config.model.path)
    if model == config.model.path:
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"path": model})})


def _mistakes(tree: dict[str, Any]) -> Iterator[str]:
    """Yield the mistakes of single fields, then those of combinations.

    Pydantic checks combinations of fields only if every field is valid: each round removes the invalid fields, so that
    their defaults take their place, and validates again.
    """
    rest = copy.deepcopy(tree)
    while True:
        try:
            Config.model_validate(rest)
            return
        except ValidationError as error:
            yield from mistakes.lines(error, Config)
            dropped = [_drop(rest, details["loc"]) for details in error.errors()]
            if not any(dropped):
                return


def _drop(tree: dict[Any, Any], location: Sequence[str | int]) -> bool:
    """Remove the value at a location, or the list that contains it. Return False if the tree has no such value."""
    *above, last = location or ("",)
    for name in above:
        inner = tree.get(name)
        if not isinstance(inner, dict):
            last = name
            break
        tree = inner
    return tree.pop(last, tree) is not tree


def _read(recipe: Path, folders: list[Path], seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the recipe's tree merged over those that it extends. Appends their folders to `folders`, its own first."""
    folder = recipe.resolve().parent
    folders.append(folder)
    try:
        text = recipe.read_text()
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {recipe}: {error.strerror}{_other_recipe(recipe)}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{recipe}: not UTF-8 text") from None
    tree = _mapping(text, str(recipe))
    references.anchor(tree, folder)
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str) or "\0" in base:
        raise ConfigError(f"{recipe}: extends must be the path of one recipe, got {mistakes.shown('extends', base)}")
    parent = packaged.find_extended(recipe, base).resolve()
    if parent in (*seen, recipe.resolve()):
        raise ConfigError(f"{recipe}: extends itself")
    return merge(_read(parent, folders, (*seen, recipe.resolve())), tree)


def _mapping(text: str, source: str) -> dict[str, Any]:
    try:
        tree = recipe_yaml.load(text)
    except recipe_yaml.RecipeError as error:
        raise ConfigError(f"{source}: invalid YAML: {error}") from None
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(f"{source}: must be a mapping of sections, got {mistakes.shown('', tree)}")
    return tree or {}


def _other_recipe(recipe: Path) -> str:
    """Return a hint for a recipe that was not found, to append to the error; empty without one."""
    if "=" in str(recipe):
        return "; give the recipe before the overrides, as in configs/demo.yaml learner.updates=50"
    recipes = [*recipe.parent.glob("*.yaml"), *Path("configs").glob("*.yaml")]
    recipes += [Path("configs", found.name) for found in packaged.recipes()]
    named = [str(found) for found in recipes if found.stem == recipe.stem]
    if named:
        return f", did you mean {named[0]}?"
    close = did_you_mean(recipe.name, {found.name: found for found in recipes})
    by_name = {found.name: str(found) for found in reversed(recipes)}
    return next((f", did you mean {path}?" for name, path in by_name.items() if f" {name}?" in close), "")


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with the values of `top` over it, section by section."""
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def _apply(tree: dict[str, Any], override: Override) -> Iterator[str]:
    """Set the values of an override in the tree; yields its mistakes."""
    if isinstance(override, Mapping):
        for path, value in override.items():
            yield from put(tree, str(path), value, merges=True)
        return
    path, equals, text = override.partition("=")
    if not equals or not path:
        yield f"'{masked(override)}': invalid override, expected key=value, as in learner.updates=50"
        return
    if not text.strip():
        yield f"{path}: missing value after '='; write null for no value"
        return
    try:
        value = recipe_yaml.load(text)
    except recipe_yaml.RecipeError as error:
        yield f"{path}: invalid YAML: {error}"
        return
    yield from put(tree, path, value, merges=False)


def put(tree: dict[str, Any], path: str, value: Any, *, merges: bool) -> Iterator[str]:
    """Set the value at a dotted path; yields the mistakes of the path.

    With `merges`, a section is merged into the existing one, key by key; otherwise it replaces it.
    """
    *parents, leaf = path.split(".")
    node = tree
    for number, name in enumerate(parents, start=1):
        inner = node.setdefault(name, {})
        if not isinstance(inner, dict):
            yield f"{path}: {'.'.join(parents[:number])} is {mistakes.shown(name, inner)}, not a section"
            return
        node = inner
    both = merges and isinstance(value, Mapping) and isinstance(node.get(leaf), dict)
    node[leaf] = merge(node[leaf], value) if both else value
