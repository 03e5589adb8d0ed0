"""An environment of one's own by `env.implementation`: found, checked, and served in a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from anchorage.checks.preflight import Start, preflight
from anchorage.runs.environments import environment_class, info_of, serve
from env_servers import registry
from services.config import load_config
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
    ("text", "line"),
    [
        ("class Door: ...", "is no class derived from Environment"),
        (OWN.replace("own_door", "other_door"), "is called 'other_door', not 'own_door'"),
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
