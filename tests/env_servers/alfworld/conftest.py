"""A small kitchen in which every rule of the game can be tried, and the sources of games."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from env_servers.alfworld.domain import domain
from env_servers.alfworld.environment import DATA_VARIABLE, game_source
from env_servers.alfworld.games import GameSource, OfficialGames
from tests import needs
from tests.official_data import folder_of

Document = dict[str, object]

_RECEPTACLES = {
    # id: type, location, openable, what stands in or on it
    "Fridge_bar_1": ("Fridge", "loc_1", True, ["Potato_bar_1"]),
    "Microwave_bar_1": ("Microwave", "loc_1", True, []),
    "CounterTop_bar_1": ("CounterTop", "loc_2", False, ["Apple_bar_1", "Apple_bar_2", "Knife_bar_1", "Mug_bar_1"]),
    "Sink_bar_1_bar_SinkBasin": ("SinkBasin", "loc_3", False, ["Bread_bar_1"]),
    "Sink_bar_1": ("Sink", "loc_3", False, []),
    "SideTable_bar_1": ("SideTable", "loc_4", False, ["DeskLamp_bar_1", "Book_bar_1"]),
    "Drawer_bar_1": ("Drawer", "loc_5", True, ["Candle_bar_1"]),
    "Drawer_bar_2": ("Drawer", "loc_5", True, []),
}
_FLAGS = {
    "pickupable": "Potato_bar_1 Apple_bar_1 Apple_bar_2 Knife_bar_1 Mug_bar_1 Spoon_bar_1 Bread_bar_1 Book_bar_1 "
    "Candle_bar_1",
    "isReceptacleObject": "Mug_bar_1",
    "cleanable": "Potato_bar_1 Apple_bar_1 Apple_bar_2 Knife_bar_1 Mug_bar_1 Spoon_bar_1",
    "heatable": "Potato_bar_1 Apple_bar_1 Apple_bar_2 Mug_bar_1 Bread_bar_1",
    "coolable": "Potato_bar_1 Apple_bar_1 Apple_bar_2 Mug_bar_1 Bread_bar_1",
    "sliceable": "Potato_bar_1 Apple_bar_1 Apple_bar_2 Bread_bar_1",
    "toggleable": "DeskLamp_bar_1 Candle_bar_1",
    "isCool": "Potato_bar_1",
}
_GOALS = {
    "pick_and_place_simple": ("Apple", "Drawer"),
    "look_at_obj_in_light": ("Book", "DeskLamp"),
    "pick_clean_then_place_in_recep": ("Mug", "CounterTop"),
    "pick_heat_then_place_in_recep": ("Apple", "Fridge"),
    "pick_cool_then_place_in_recep": ("Potato", "CounterTop"),
    "pick_two_obj_and_place": ("Apple", "Drawer"),
}


def build_kitchen(
    task_type: str = "pick_and_place_simple", *, start: str = "loc_0", official_domain: bool = False
) -> Document:
    """The game document of the small kitchen: a sink beside its basin, two drawers and two cold places to stand at."""
    kind, target = _GOALS[task_type]
    goal = domain().goals[task_type].pddl.format(obj=kind, recep=target, toggle=target).replace("#", "-")
    pddl = domain().pddl
    if official_domain:
        basin = "(receptacleType ?r SinkBasinType)"
        pddl = pddl.replace(basin, f"(receptacleType ?r SinkType) {basin}")
    things = {thing: place for _, place, _, inside in _RECEPTACLES.values() for thing in inside}
    things["Spoon_bar_1"] = things["Mug_bar_1"]
    types = {thing: thing.partition("_bar_")[0] for thing in things}
    places = ["loc_0", *sorted({place for _, place, _, _ in _RECEPTACLES.values()})]
    declared = ["agent1 - agent", *(f"{place} - location" for place in places)]
    declared += [f"{kind}Type - rtype" for kind in sorted({row[0] for row in _RECEPTACLES.values()} | {"SinkBasin"})]
    declared += [f"{kind}Type - otype" for kind in sorted(set(types.values()))]
    declared += [f"{r} - receptacle" for r in _RECEPTACLES] + [f"{thing} - object" for thing in things]
    facts = [f"atLocation agent1 {start}"]
    for r, (kind_of_place, place, openable, inside) in _RECEPTACLES.items():
        facts += [f"receptacleType {r} {kind_of_place}Type", f"receptacleAtLocation {r} {place}"]
        facts += [f"openable {r}"] if openable else []
        facts += [f"inReceptacle {thing} {r}" for thing in inside]
        facts += [
            f"canContain {kind_of_place}Type {kind}Type" for kind in sorted(set(types.values())) if kind != "Book"
        ]
    facts += ["inReceptacle Spoon_bar_1 CounterTop_bar_1", "inReceptacleObject Spoon_bar_1 Mug_bar_1"]
    facts += [f"objectType {thing} {kind}Type" for thing, kind in types.items()]
    facts += [f"objectAtLocation {thing} {place}" for thing, place in things.items()]
    facts += [f"{flag} {thing}" for flag, row in _FLAGS.items() for thing in row.split()]
    problem = "(define (problem kitchen)\n(:domain alfred)\n(:objects\n" + "\n".join(declared) + "\n)\n(:init\n"
    problem += "\n".join(f"({fact})" for fact in dict.fromkeys(facts)) + "\n)\n" + goal
    return {
        "pddl_domain": pddl,
        "grammar": domain().grammar.replace("UNKNOWN GOAL", "tidy the kitchen"),
        "pddl_problem": problem,
        "solvable": True,
        "walkthrough": [],
    }


@pytest.fixture(scope="session")
def kitchen() -> Callable[..., Document]:
    """Builds the small kitchen: `kitchen(task_type, start=…, official_domain=…)`."""
    return build_kitchen


@pytest.fixture
def generated_games(monkeypatch: pytest.MonkeyPatch) -> Iterator[GameSource]:
    """Generated games, whatever the surroundings say."""
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    game_source.cache_clear()
    yield game_source()
    game_source.cache_clear()


@pytest.fixture(scope="session")
def official_games() -> GameSource:
    """The official games below `ALFWORLD_DATA`."""
    folder = folder_of(DATA_VARIABLE)
    if folder is None:
        pytest.skip(needs.ALFWORLD)
    return OfficialGames(folder)
