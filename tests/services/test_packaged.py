"""Recipes and the starter policy are found from any folder, and a file of the user's own comes first."""

from __future__ import annotations

from pathlib import Path

import pytest

from services import packaged
from services.config import ConfigError, load_config
from services.config.provenance import settings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_everything_in_the_repository_is_found_outside_it(elsewhere: Path) -> None:
    for file in [*(ROOT / "configs").iterdir(), *(ROOT / "models" / "starter").iterdir()]:
        found = packaged.find(file.relative_to(ROOT))
        assert found.is_absolute()
        assert found.read_bytes() == file.read_bytes()


def test_a_file_in_the_working_directory_comes_first(elsewhere: Path) -> None:
    own = Path("configs", "demo.yaml")
    assert packaged.find_recipe(Path("demo")) == packaged.find(own) != own
    own.parent.mkdir()
    own.write_text("run: {name: mine}")
    assert packaged.find(own) == packaged.find_recipe(Path("demo")) == own
    assert load_config(Path("demo")).run.name == "mine"


def test_other_paths_stay_as_they_are(elsewhere: Path) -> None:
    for path in (
        "configs/none.yaml",
        "models/none",
        "elsewhere/demo.yaml",
        "/configs/demo.yaml",
        "../configs/demo.yaml",
    ):
        assert packaged.find(Path(path)) == Path(path)
    for path in ("none", "demo.yaml", "runs/demo"):
        assert packaged.find_recipe(Path(path)) == Path(path)


def test_a_recipe_and_its_policy_load_outside_the_repository(elsewhere: Path) -> None:
    (elsewhere / "demo").mkdir()  # a folder of that name is no recipe
    by_name, by_path = load_config(Path("demo")), load_config(Path("configs/demo.yaml"))
    assert by_name == by_path
    assert by_name.run.name == "demo"
    assert by_name.model.path.is_absolute()
    assert (by_name.model.path / "config.json").is_file()
    assert load_config(None).model.path == by_name.model.path
    assert load_config(Path("demo"), ["model.path=models/mine"]).model.path == Path("models/mine")


def test_recipes_that_extend_others_load_outside_the_repository(elsewhere: Path) -> None:
    extending = [recipe for recipe in packaged.recipes() if "extends:" in recipe.read_text()]
    assert extending
    for recipe in extending:
        assert load_config(Path(recipe.stem)) == load_config(recipe)


@pytest.mark.parametrize("base", ["demo", "demo.yaml"])
def test_a_recipe_of_ones_own_extends_a_packaged_one(elsewhere: Path, base: str) -> None:
    own = elsewhere / "own.yaml"
    own.write_text(f"extends: {base}\nrun: {{name: own}}\n")
    assert load_config(own) == load_config(Path("demo"), ["run.name=own"]).model_copy(
        update={"plugins": load_config(own).plugins}
    )
    sources = {setting.key: setting.source for setting in settings(own, [])}
    assert sources["run.name"].endswith("own.yaml")
    assert sources["run.seed"].endswith("configs/demo.yaml")


def test_in_the_repository_paths_stay_relative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert packaged.find_recipe(Path("demo")) == Path("configs/demo.yaml")
    assert load_config(Path("demo")).model.path == Path("models/starter")


def test_a_mistyped_recipe_is_answered_with_packaged_ones(elsewhere: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean configs/demo\.yaml\?"):
        load_config(Path("dmo.yaml"))
