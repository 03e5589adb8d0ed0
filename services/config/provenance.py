"""The source of each value of a configuration: a default, the algorithm's preset, a recipe, or the command line.

Recipe and overrides are applied a second time, to a tree in which the name of its source replaces each value.

Invariants
- The keys are those of the effective tree, in its order, and credentials in values are masked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services import packaged
from services.config import load, recipe_yaml
from services.config.masking import masked
from services.config.presets import PRESETS

DEFAULT = "default"
COMMAND_LINE = "command line"


@dataclass(frozen=True, slots=True)
class Setting:
    """One value of the effective tree.

    Attributes:
        key: dotted, as in an override.
        value: plain data; a credential is masked.
        source: `default`, `preset ALGORITHM`, the path of a recipe, or `command line`.
    """

    key: str
    value: Any
    source: str


def settings(recipe: Path | None, overrides: Sequence[str] = ()) -> list[Setting]:
    """Return every value of the effective tree with its source.

    Raises:
        ConfigError: as `load_config`.

    Example:
        [s for s in settings(Path("configs/demo.yaml"), ["run.seed=3"]) if s.key == "run.seed"]
        # [Setting(key="run.seed", value=3, source="command line")]
    """
    recipe = packaged.find_recipe(recipe) if recipe is not None else None
    config = load.load_config(recipe, overrides)
    labels: dict[str, Any] = {}
    for path, tree in _layers(packaged.find_recipe(recipe)) if recipe is not None else ():
        labels = load.merge(labels, _labelled(tree, str(path)))
    for override in overrides:
        key, _, text = override.partition("=")
        problems = load.put(labels, key, _labelled(recipe_yaml.load(text), COMMAND_LINE), merges=False)
        assert not [*problems], "load_config rejects such overrides"
    preset = _labelled(PRESETS.get(config.algorithm, {}), f"preset {config.algorithm}")
    labels = load.merge(preset, labels)
    tree = masked(config.model_dump(mode="json"))
    return [Setting(".".join(path), value, _source(labels, path)) for path, value in _leaves(tree)]


def _layers(recipe: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return the trees of a recipe and of those that it extends, each with its path, the base first."""
    tree = dict(recipe_yaml.load(recipe.read_text()) or {})
    base = tree.pop("extends", None)
    below = _layers(packaged.find_extended(recipe, base)) if base is not None else []
    return [*below, (recipe, tree)]


def _labelled(value: Any, source: str) -> Any:
    """Return the tree with each value replaced by the source."""
    if isinstance(value, Mapping):
        return {key: _labelled(inner, source) for key, inner in value.items()}
    return source


def _source(labels: Any, path: Sequence[str]) -> str:
    """Return the label at a path, or the label of the value that contains it, such as a list."""
    for name in path:
        if not isinstance(labels, Mapping):
            break
        labels = labels.get(name, DEFAULT)
    return labels if isinstance(labels, str) else DEFAULT


def _leaves(tree: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*above, key))
        else:
            yield (*above, key), value


def annotated(found: Sequence[Setting], column: int = 44) -> str:
    """Return the settings as YAML that is a valid recipe, with each source in a comment from `column` on."""
    lines: list[str] = []
    open_sections: list[str] = []
    for setting in found:
        *sections, name = setting.key.split(".")
        common = 0
        while common < min(len(sections), len(open_sections)) and sections[common] == open_sections[common]:
            common += 1
        for depth in range(common, len(sections)):
            lines.append(f"{'  ' * depth}{sections[depth]}:")
        open_sections = sections
        line = f"{'  ' * len(sections)}{recipe_yaml.dump_line(name, setting.value)}"
        lines.append(f"{line:<{column}}  # {setting.source}")
    return "\n".join(lines) + "\n"


def record(found: Sequence[Setting]) -> dict[str, dict[str, Any]]:
    """Return the settings by key, as data for JSON."""
    return {setting.key: {"value": setting.value, "source": setting.source} for setting in found}
