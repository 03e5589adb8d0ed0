"""Memory of a run's containers: it grows with the model, and what is printed is what compose and the chart take."""

from __future__ import annotations

import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from deploy.size import GIB, as_env, as_values, main, sizes
from services.config import load_config
from services.config.tree import Config
from tests.deploy.chart_variants import merged
from tests.deploy.test_cluster_files import SCHEMA

ROOT = Path(__file__).resolve().parents[2]
BILLION = 10**9


def made(**sections: object) -> Config:
    return Config.model_validate({"model": {"dtype": "bfloat16"}, **sections})


def test_the_worked_example_of_the_module() -> None:
    found = sizes(made(), 3 * GIB // 2)  # 1.5 · 2³⁰ parameters are 3 GiB
    assert (found.store, found.shm) == (16, 18)
    assert (found.actor, found.learner, found.trainer) == (32, 32, 28)


def test_everything_grows_with_the_model() -> None:
    small, large = (sizes(made(), size * BILLION) for size in (1, 7))
    for name in ("store", "shm", "actor", "learner", "trainer", "runs"):
        assert getattr(large, name) > getattr(small, name)


@pytest.mark.parametrize("size", [0, BILLION // 2, 7 * BILLION, 70 * BILLION])
def test_the_store_fits_into_shared_memory_and_that_into_each_container(size: int) -> None:
    found = sizes(made(), size, places=2)
    assert found.store < found.shm < min(found.actor, found.learner, found.trainer)


def test_places_and_ranks_of_a_container_count() -> None:
    config = made(learner={"ranks": 4})
    assert sizes(config, BILLION, places=4).actor > sizes(config, BILLION, places=1).actor
    assert sizes(config, BILLION).learner > sizes(config, BILLION, ranks=1).learner


def test_the_optimizer_on_the_cpu_takes_sixteen_bytes_a_parameter_over_all_ranks() -> None:
    plain, offloaded = (
        sizes(made(learner={"ranks": 2, "zero_stage": 1, "offload_optimizer": value}), 8 * GIB)
        for value in (False, True)
    )
    assert offloaded.learner - plain.learner == 16 * 8


def test_adapters_travel_lightly() -> None:
    whole, adapters = (sizes(made(model={"dtype": "bfloat16", "lora": lora}), 7 * BILLION) for lora in (None, {}))
    assert adapters.store < whole.store / 5
    assert adapters.runs < whole.runs


def test_the_lines_set_variables_that_compose_has() -> None:
    compose = (ROOT / "docker-compose.yml").read_text() + (ROOT / "docker-compose.gpu.yml").read_text()
    names = re.findall(r"^(\w+)=\d+g?$", as_env(sizes(made(), BILLION)), re.MULTILINE)
    assert len(names) == 5
    assert all(f"${{{name}:-" in compose for name in names)


def test_the_values_are_valid_and_raise_the_limits() -> None:
    values = yaml.safe_load(as_values(sizes(made(), 7 * BILLION)))
    whole = merged(values)
    jsonschema.validate(whole, SCHEMA)
    assert whole["rollout"]["resources"]["limits"]["memory"] == f"{sizes(made(), 7 * BILLION).actor}Gi"
    assert whole["rollout"]["resources"]["requests"]["cpu"]  # the defaults stay where nothing is said


def test_the_command_reads_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(ROOT / "configs" / "demo.yaml"), "model.dtype=float32"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("# 0.00 B parameters, float32")
    expected = sizes(load_config(ROOT / "configs" / "demo.yaml"), 600_000)
    assert as_env(expected) in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["configs/none.yaml"], "cannot read the recipe configs/none.yaml"),
        (["configs/demo.yaml", "model.path=/nowhere"], "no *.safetensors in /nowhere"),
    ],
)
def test_mistakes_are_said_in_a_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert len(printed.splitlines()) == 1
