"""The recipes and the starter policy that come with the project, found from any working directory.

`configs` and `models` beside this file are links to the repository's folders; an installed package holds their files.
"""

from __future__ import annotations

from pathlib import Path

_FOLDERS = ("configs", "models")
_HERE = Path(__file__).resolve().parent


def find(path: Path) -> Path:
    """`path` where it exists; else the packaged file or folder of that name, where there is one; else `path`.

    Example:
        find(Path("models/starter"))  # in a checkout: models/starter; elsewhere: …/site-packages/services/packaged/…
    """
    if path.exists() or path.is_absolute() or path.parts[:1] not in {(folder,) for folder in _FOLDERS}:
        return path
    packaged = _HERE / path
    return packaged if packaged.exists() else path


def find_recipe(recipe: Path) -> Path:
    """Like `find`, and a bare name stands for a recipe of that name in `configs`: `demo` for `configs/demo.yaml`."""
    if recipe.is_file() or recipe.suffix or len(recipe.parts) != 1:
        return find(recipe)
    named = find(Path("configs", f"{recipe}.yaml"))
    return named if named.is_file() else recipe


def find_extended(recipe: Path, base: str) -> Path:
    """The recipe that `recipe` names as `extends`: relative to it; else the packaged one of that name, if there is one.

    Example: `extends: demo.yaml` and `extends: demo`, with no such file beside the recipe, are the packaged demo.
    """
    beside = recipe.parent / base
    if beside.exists() or len(Path(base).parts) != 1:
        return beside
    named = _HERE / "configs" / f"{base.removesuffix('.yaml')}.yaml"
    return named if named.is_file() else beside


def recipes() -> list[Path]:
    """The packaged recipes, in order of their names."""
    return sorted((_HERE / "configs").glob("*.yaml"))
