"""The rules that come with the project are those of the official package."""

from __future__ import annotations

from importlib import metadata, resources

import pytest

from env_servers.alfworld.domain import domain
from env_servers.alfworld.package import alfworld_module
from env_servers.alfworld.problem import TASK_TYPES
from tests import needs


@pytest.fixture(scope="module", autouse=True)
def _official_package() -> None:
    try:
        version = metadata.version("alfworld")
    except metadata.PackageNotFoundError:
        pytest.skip(needs.TEXTWORLD)
    assert version == "0.4.2"


def test_domain_and_grammar_are_the_official_ones() -> None:
    alfworld_module("info")
    data = resources.files("alfworld") / "data"
    assert domain().pddl == (data / "alfred.pddl").read_text()
    assert domain().grammar == (data / "alfred.twl2").read_text()


def test_goals_are_the_official_ones() -> None:
    official = alfworld_module("gen.goal_library").gdict
    assert set(domain().goals) == set(TASK_TYPES)
    for task, goal in domain().goals.items():
        assert (goal.pddl, list(goal.templates)) == (official[task]["pddl"], official[task]["templates"])


def test_what_fits_and_what_can_be_done_is_official() -> None:
    official = alfworld_module("gen.constants")
    assert domain().fits == {place: set(kinds) for place, kinds in official.VAL_RECEPTACLE_OBJECTS.items()}
    assert domain().able == {action: set(official.VAL_ACTION_OBJECTS[action]) for action in domain().able}
    assert set(domain().able) == {"Cleanable", "Heatable", "Coolable", "Sliceable"}
    assert domain().movable_receptacles == set(official.MOVABLE_RECEPTACLES_SET)
