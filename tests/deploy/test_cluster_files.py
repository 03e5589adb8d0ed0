"""The Helm chart's values and the cluster launcher's file: their schemas hold, and versions are those of the images."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from services.config import load_config

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "anchorage"
VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA = json.loads((CHART / "values.schema.json").read_text())
TEMPLATES = {path.name: path.read_text() for path in (CHART / "templates").iterdir()}


def changed(path: str, value: object) -> dict[str, Any]:
    tree = copy.deepcopy(VALUES)
    *parents, last = path.split(".")
    place = tree
    for name in parents:
        place = place[name]
    place[last] = value
    return tree


def test_the_default_values_are_valid() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    jsonschema.validate(VALUES, SCHEMA)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("secret", ""),
        ("redis.external", "redis://:password@host:6379"),
        ("redis.external", "redis.example"),
        ("runs.size", ""),
        ("unknown", 1),
        ("rollout.max", 0),
        ("rollout.max", -1),
        ("learner.gpus", -1),
        ("trainer.grace", 0),
        ("rollout.replicas", 2),
        ("trainer.overrides", ["no override"]),
        ("image.pullPolicy", "Sometimes"),
        ("environments", []),
        ("environments", [{**VALUES["environments"][0], "name": "redis"}]),
    ],
)
def test_wrong_values_are_refused(path: str, value: object) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(changed(path, value), SCHEMA)


def test_every_value_that_a_template_uses_exists() -> None:
    for name, text in TEMPLATES.items():
        for path in re.findall(r"\.Values\.([A-Za-z.]+)", text):
            place: Any = VALUES
            for part in path.split("."):
                assert part in place, f"{name}: {path}"
                place = place[part]


def test_every_template_that_is_included_is_defined() -> None:
    everything = "".join(TEMPLATES.values())
    defined = set(re.findall(r'define "([^"]+)"', everything))
    assert set(re.findall(r'include "([^"]+)"', everything)) == defined


def test_every_block_is_ended() -> None:
    for name, text in TEMPLATES.items():
        opened = len(re.findall(r"\{\{-?\s*(?:if|range|with|define)\b", text))
        assert opened == len(re.findall(r"\{\{-?\s*end\b", text)), name


def test_every_pod_is_confined() -> None:
    for name in ("redis.yaml", "environments.yaml", "raycluster.yaml", "trainer.yaml", "control.yaml"):
        text = TEMPLATES[name]
        pods = len(re.findall(r"^\s+containers:$", text, re.MULTILINE))
        assert (
            pods == text.count('include "anchorage.podSecurity"') <= text.count('include "anchorage.containerSecurity"')
        )


def test_ray_is_the_one_of_the_images() -> None:
    pinned = re.search(r"^ray==(\S+)", (ROOT / "requirements" / "cpu.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert VALUES["rayVersion"] == pinned[1]


def test_images_have_the_version_of_the_project() -> None:
    version = re.search(r'^version = "(\S+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == chart["version"] == version[1]
    assert all(f":{version[1]}" in VALUES["image"][name] for name in ("node", "environment", "redis"))
    compose = (ROOT / "docker-compose.yml").read_text()
    assert set(re.findall(r"ANCHORAGE_TAG:-([^}]+)\}", compose)) == {version[1]}


def test_the_trainers_recipe_is_there() -> None:
    load_config(ROOT / VALUES["trainer"]["recipe"])


def test_the_launcher_file_is_one_that_ray_takes() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    tree = yaml.safe_load((ROOT / "deploy" / "ray-cluster.yaml").read_text())
    validate_config(prepare_config(tree))
    commands = " ".join([*tree["head_start_ray_commands"], *tree["worker_start_ray_commands"]])
    assert commands.count("RAY_AUTH_MODE=token") == 2
    assert '{"learner": 1}' in commands
    assert '{"rollout": 1}' in commands
