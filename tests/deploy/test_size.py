"""Memory of a run's containers: it grows with the model, and what is printed is what compose and the chart take."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import yaml

from anchorage.planning.shapes import PUBLISHED, Shape, shape_of
from deploy import size
from deploy.size import GIB, as_env, as_values, main, sizes
from services.config import load_config
from services.config.tree import Config
from services.weights.channel import KEPT_VERSIONS
from tests.deploy.chart_variants import merged
from tests.deploy.test_cluster_files import SCHEMA

ROOT = Path(__file__).resolve().parents[2]
SMALL, MIDDLE, LARGE = (
    PUBLISHED[name] for name in ("Qwen2.5-0.5B-Instruct", "Qwen2.5-1.5B-Instruct", "Qwen2.5-7B-Instruct")
)
PARTS = ("store", "shm", "actor", "learner", "trainer", "runs")


def made(**sections: object) -> Config:
    return Config.model_validate({"model": {"dtype": "bfloat16"}, **sections})


def test_the_worked_example_of_the_module() -> None:
    found = sizes(replace(MIDDLE, stored=3 * GIB // 2), made())  # of two bytes each: 3 GiB
    assert (found.store, found.shm) == (7, 9)
    assert (found.actor, found.learner, found.trainer) == (22, 25, 18)
    text = str(size.__doc__)
    assert all(f"{number} GiB" in text for number in (7, 9, 22, 25, 18))


def test_the_store_holds_the_versions_that_are_kept() -> None:
    """Chunks for other nodes; a version that is handed over, or read, takes no further room there."""
    for shape in (SMALL, LARGE):
        versions = KEPT_VERSIONS * 2 * shape.parameters / GIB
        assert versions < sizes(shape, made()).store < versions + size.STORE_GIB + 1.5


def test_everything_grows_with_the_model() -> None:
    for smaller, larger in ((SMALL, MIDDLE), (MIDDLE, LARGE)):
        for part in PARTS:
            assert getattr(sizes(larger, made()), part) > getattr(sizes(smaller, made()), part)


@pytest.mark.parametrize("shape", [SMALL, MIDDLE, LARGE])
def test_the_store_fits_into_shared_memory_and_that_into_each_container(shape: Shape) -> None:
    found = sizes(shape, made(), places=2)
    assert found.store < found.shm < min(found.actor, found.learner, found.trainer)


def test_places_and_ranks_of_a_container_count() -> None:
    config = made(learner={"ranks": 4})
    assert sizes(MIDDLE, config, places=4).actor > sizes(MIDDLE, config, places=1).actor
    assert sizes(MIDDLE, config).learner > sizes(MIDDLE, config, ranks=1).learner


def test_what_is_off_loaded_is_in_the_learners_memory() -> None:
    plain, offloaded = (
        sizes(LARGE, made(learner={"ranks": 2, "zero_stage": 2, "offload_optimizer": value})) for value in (False, True)
    )
    assert (offloaded.learner - plain.learner) * GIB >= 12 * LARGE.parameters  # masters and moments, of all ranks
    assert offloaded.actor == plain.actor


def test_adapters_travel_lightly() -> None:
    whole, adapters = (sizes(LARGE, made(model={"dtype": "bfloat16", "lora": lora})) for lora in (None, {}))
    assert adapters.store < whole.store / 5
    assert adapters.runs < whole.runs


def test_the_lines_set_variables_that_compose_has() -> None:
    compose = (ROOT / "docker-compose.yml").read_text() + (ROOT / "docker-compose.gpu.yml").read_text()
    names = re.findall(r"^(\w+)=\d+g?$", as_env(sizes(MIDDLE, made())), re.MULTILINE)
    assert len(names) == 5
    assert all(f"${{{name}:-" in compose for name in names)


def test_the_values_are_valid_and_raise_the_limits() -> None:
    values = yaml.safe_load(as_values(sizes(LARGE, made())))
    whole = merged(values)
    jsonschema.validate(whole, SCHEMA)
    assert whole["rollout"]["resources"]["limits"]["memory"] == f"{sizes(LARGE, made()).actor}Gi"
    assert whole["rollout"]["resources"]["requests"]["cpu"]  # the defaults stay where nothing is said


def test_the_command_reads_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(ROOT / "configs" / "demo.yaml"), "model.dtype=float32"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("# 0.00 B parameters, float32")
    config = load_config(ROOT / "configs" / "demo.yaml")
    assert as_env(sizes(shape_of(config.model.path), config)) in printed


@pytest.mark.parametrize("option", ["--places", "--ranks"])
def test_a_container_without_places_or_ranks_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(ROOT / "configs" / "demo.yaml"), option, "0"])
    assert f"argument {option}: must be >= 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["configs/none.yaml"], "cannot read the recipe configs/none.yaml"),
        (["configs/demo.yaml", "model.path=/nowhere"], "/nowhere has no config.json"),
    ],
)
def test_mistakes_are_said_in_a_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert len(printed.splitlines()) == 1
