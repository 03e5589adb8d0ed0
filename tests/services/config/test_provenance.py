"""Who set each value: defaults, presets, recipes that extend one another, the command line; credentials are masked."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.config import ConfigError, load_config
from services.config.provenance import annotated, record, settings

ROOT = Path(__file__).resolve().parents[3]
DEMO = ROOT / "configs" / "demo.yaml"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text("algorithm: dapo\nrun: {name: base, seed: 1}\nloss: {clip_low: 0.1}\n")
    child = tmp_path / "child.yaml"
    child.write_text("extends: base.yaml\nrun: {name: child}\nmodel: {lora: {rank: 4}}\n")
    return child


def test_each_value_has_the_source_that_set_it_last(recipe: Path) -> None:
    base = str(recipe.with_name("base.yaml"))
    found = record(settings(recipe, ["run.seed=7", "loss.kl_coef=0.5", "envs=[{name: alfworld}]"]))
    sources = {key: setting["source"] for key, setting in found.items()}
    assert [(key, found[key]["value"], sources[key]) for key in ("run.name", "run.seed", "run.dir", "algorithm")] == [
        ("run.name", "child", str(recipe)),
        ("run.seed", 7, "command line"),
        ("run.dir", "runs", "default"),
        ("algorithm", "dapo", base),
    ]
    assert (sources["loss.clip_low"], sources["loss.clip_high"]) == (base, "preset dapo")
    assert (sources["loss.kl_coef"], sources["loss.ratio"]) == ("command line", "default")
    assert (sources["model.lora.rank"], sources["model.lora.alpha"]) == (str(recipe), "default")
    assert sources["envs"] == "command line"


def test_a_section_that_an_override_replaces_takes_its_values_with_it(recipe: Path) -> None:
    sources = {s.key: s.source for s in settings(recipe, ["loss={kl_coef: 0.5}", "model.lora=null"])}
    assert (sources["loss.clip_low"], sources["loss.kl_coef"]) == ("preset dapo", "command line")
    assert sources["model.lora"] == "command line"
    assert "model.lora.rank" not in sources


def test_the_algorithm_of_the_command_line_brings_its_preset() -> None:
    sources = {s.key: s.source for s in settings(DEMO, ["algorithm=gspo"])}
    assert (sources["algorithm"], sources["loss.ratio"]) == ("command line", "preset gspo")
    assert sources["loss.kl_coef"] == str(DEMO)


@pytest.mark.parametrize("name", ["demo.yaml", "starter.yaml", "webshop.yaml", "alfworld-7b.yaml"])
def test_what_is_shown_is_a_recipe_of_the_same_configuration(name: str, tmp_path: Path) -> None:
    source = ROOT / "configs" / name
    shown = tmp_path / "shown.yaml"
    shown.write_text(annotated(settings(source, ["run.seed=3"])))
    assert load_config(shown) == load_config(source, ["run.seed=3"])
    assert f"# {source}" in shown.read_text()


def test_a_packaged_recipe_is_named_by_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (source,) = {s.source for s in settings(Path("demo")) if s.key == "learner.groups_per_update"}
    assert Path(source).samefile(DEMO)


def test_credentials_are_masked_and_mistakes_are_told() -> None:
    text = annotated(settings(DEMO, ["buffer.redis_url=redis://:secret@there:6379"]))
    assert "secret" not in text
    assert "//there:6379" in text
    with pytest.raises(ConfigError, match=r"unknown key, did you mean learner\.updates"):
        settings(DEMO, ["learner.updatse=3"])
