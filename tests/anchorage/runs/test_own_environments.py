"""An environment of one's own by `env.implementation`: found, checked, and served in a process of its own; with
parameters too."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from anchorage.checks.preflight import Start, preflight
from anchorage.runs import warmstart
from anchorage.runs.baselines import evaluate_baseline
from anchorage.runs.environments import environment_class, info_of, serve
from env_servers import registry
from services.config import ConfigError, load_config
from services.config.tree import Config
from services.errors import EnvironmentUnavailable, PreflightFailed

OWN = """
from env_servers.environment import Environment, Observation

class Door(Environment):
    name = "own_door"

    @classmethod
    def splits(cls):
        return {"train": 3}

    def reset(self, split, index, *, expert=False):
        return Observation("A door.", admissible=("open",))

    def step(self, action):
        return Observation("Open.", reward=1.0, terminated=True)
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(registry, "ENVIRONMENTS", dict(registry.ENVIRONMENTS))
    (tmp_path / "own_doors.py").write_text(OWN)
    text = f"env: {{name: own_door, implementation: ./own_doors.py:Door}}\nrun: {{dir: {tmp_path}/runs}}\n"
    (tmp_path / "own.yaml").write_text(text)
    return tmp_path / "own.yaml"


def test_a_server_is_started_for_it(recipe: Path, tmp_path: Path) -> None:
    env = load_config(recipe).env
    assert environment_class(env).name == "own_door"
    server = serve(env, tmp_path, port=0)
    try:
        assert info_of(env, [server.url]).splits == {"train": 3}
    finally:
        server.stop()


def test_it_is_checked_before_anything_starts(recipe: Path) -> None:
    preflight(Start(load_config(recipe), models=()))
    with pytest.raises(PreflightFailed, match="own_door has no tasks in split 'test'"):
        preflight(Start(load_config(recipe, ["env.split=test"]), trains=True))


@pytest.mark.parametrize(
    ("before", "after", "line"),
    [
        (
            'return Observation("A',
            '1 / 0; return Observation("A',
            r"reset\('train', 0\): ZeroDivisionError: .*\.py:12\)",
        ),
        ('return Observation("A', 'raise SystemExit(2); return Observation("A', r"reset\('train', 0\): SystemExit: 2"),
        ('return Observation("A', 'import time; time.sleep(60); return Observation("A', "take longer than"),
        ('A door."', 'A door.", terminated=True', "ends the episode before the first action"),
        ('return Observation("Open', 'return len(3) or Observation("Open', r"step\('open'\): TypeError"),
        ("reward=1.0", "reward=float('nan')", r"step\('open'\): .* reward is nan, not a finite number"),
        ('return Observation("Open.", reward=1.0, terminated=True)', "pass", "must return an Observation"),
    ],
)
def test_it_is_played_once_before_anything_starts(
    tmp_path: Path, recipe: Path, before: str, after: str, line: str
) -> None:
    module = f"own_doors_{abs(hash(after))}"
    assert before in OWN
    (tmp_path / f"{module}.py").write_text(OWN.replace(before, after))
    config = load_config(recipe, [f"env.implementation={tmp_path}/{module}.py:Door", "env.request_timeout_s=1"])
    with pytest.raises(PreflightFailed, match=f"^env.implementation={tmp_path}/{module}.py:Door: .*{line}"):
        preflight(Start(config, models=(), trains=True))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("class Door: ...", "is not a class derived from Environment"),
        (OWN.replace("own_door", "other_door"), "has the name 'other_door', not 'own_door'"),
        ("1 / 0", "cannot be imported: ZeroDivisionError"),
        ("import no_such_thing", "No module named 'no_such_thing'"),
    ],
)
def test_what_is_wrong_with_it_is_one_line(tmp_path: Path, recipe: Path, text: str, line: str) -> None:
    module = f"own_doors_{abs(hash(text))}"
    (tmp_path / f"{module}.py").write_text(text + "\n")
    config: Config = load_config(recipe, [f"env.implementation={tmp_path}/{module}.py:Door"])
    with pytest.raises(EnvironmentUnavailable) as caught:
        environment_class(config.env)
    assert line in str(caught.value)
    assert str(caught.value).startswith(f"env.implementation={tmp_path}/{module}.py:Door")
    assert len(str(caught.value).splitlines()) == 1


HALL = """
from pydantic import BaseModel, Field
from env_servers.environment import Environment, Observation

class Hall(Environment):
    name = "own_hall"

    class Params(BaseModel):
        doors: int = Field(3, ge=1)
        colour: str

    @classmethod
    def splits(cls):
        return {"train": cls.params.doors}

    @classmethod
    def about(cls):
        return {"fingerprint": cls.params.model_dump_json()}

    def reset(self, split, index, *, expert=False):
        return Observation(f"A {self.params.colour} door.", admissible=("open",), expert="open" if expert else None)

    def step(self, action):
        won = self.params.colour == "green"
        return Observation("Open.", reward=float(won), terminated=True, facts={"won": won})
"""


@pytest.fixture
def hall(recipe: Path) -> Path:
    """A recipe of an environment with parameters."""
    (recipe.parent / "own_halls.py").write_text(HALL)
    text = "env: {name: own_hall, implementation: ./own_halls.py:Hall, params: {doors: 5, colour: green}}\n"
    recipe.write_text(text + f"run: {{dir: {recipe.parent}/runs}}\n")
    return recipe


def test_a_server_of_the_run_gets_the_parameters(hall: Path, tmp_path: Path) -> None:
    env = load_config(hall, ['env.params.colour=a "blue" one']).env
    with serve(env, tmp_path, port=0) as server:
        info = info_of(env, [server.url])
    assert (info.splits, info.fingerprint) == ({"train": 5}, '{"doors":5,"colour":"a \\"blue\\" one"}')


def test_players_of_this_process_get_the_parameters(hall: Path) -> None:
    won = {}
    for colour in ("green", "red"):
        config = load_config(hall, [f"env.params.colour={colour}", "evaluation.split=train", "evaluation.episodes=5"])
        won[colour] = evaluate_baseline("random", config, lambda ended, won: None).success.value
        (turn,) = next(warmstart._turns(config, config.warmstart.phases[0], "test"))
        assert turn.result.observation == f"A {colour} door."
    assert won == {"green": 1.0, "red": 0.0}


def lines(config: Config) -> list[str]:
    with pytest.raises(PreflightFailed) as caught:
        preflight(Start(config))
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"door": 5, "colour": "red"}, ["params.door: LABEL has no such parameter, did you mean doors?"]),
        ({"doors": 0, "colour": 3}, ["params.doors: must be >= 1, got 0", "params.colour: must be text (quote it"]),
        ({}, ["params.colour: missing value"]),
    ],
)
def test_wrong_parameters_are_one_line_each_before_anything_starts(
    hall: Path, params: dict[str, Any], expected: list[str]
) -> None:
    config = load_config(hall, [{"env.params": None}, {"env.params": params}])
    label = f"env.implementation={config.env.implementation}"
    told = lines(config)
    assert len(told) == len(expected)
    for line, start in zip(told, expected, strict=True):
        assert line.startswith("env." + start.replace("LABEL", label))


def test_parameters_without_a_model_or_for_a_running_server_are_errors(recipe: Path) -> None:
    config = load_config(recipe, ["env.params.size=5"])
    label = f"env.implementation={config.env.implementation}"
    assert lines(config) == [f"env.params.size: {label} takes no parameters (its class declares no `Params`)"]
    assert lines(load_config({}, ["env.params.size=5"])) == [
        "env.params.size: env.name=alfworld takes no parameters (its class declares no `Params`)"
    ]
    with pytest.raises(ConfigError, match=r"^env: params cannot be given with url or urls: a running server has its"):
        load_config(recipe, ["env.params.size=5", "env.url=http://127.0.0.1:8001"])


def test_each_of_several_environments_has_its_parameters(hall: Path) -> None:
    config = load_config(hall)
    envs = [config.env.model_dump(), {"name": "webshop"}]
    mixed = Config.model_validate({"envs": envs})
    assert [env.params for env in mixed.environments] == [{"doors": 5, "colour": "green"}, {}]
    assert environment_class(mixed.environments[0]).splits() == {"train": 5}
    envs[0]["params"] = {"colour": "red", "dors": 1}
    assert lines(Config.model_validate({"envs": envs}))[0].startswith("env.params.dors: env.implementation=")
