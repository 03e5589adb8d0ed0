"""Generates ALFWorld games: seeded, of all six task types, in the published file format, all verified to be solvable.

Invariants
- A game depends only on `(split, index)`: it is the same in every process and on every machine.
- Task types alternate, so any six consecutive games of a split cover all six.
- Rooms of `valid_unseen` occur in no other split; `valid_seen` has the rooms of `train` but different games.
- Rooms of `train_large` are as large as the official ones; other rooms are mostly smaller.
- A game is returned only after its walkthrough was played to a win; its initial state never satisfies the goal.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from env_servers.alfworld.domain import domain
from env_servers.alfworld.expert import Planner
from env_servers.alfworld.native import NativeGame
from env_servers.alfworld.problem import TASK_TYPES, parse_game
from env_servers.alfworld.rooms import LAMP_PLACES, LAMPS, OPENABLE, ROOMS, SCENE_SIZES, RoomKind

SPLITS: Mapping[str, int] = {"train": 4096, "train_large": 4096, "valid_seen": 256, "valid_unseen": 256}

_SCENES = {
    "train": range(7, 31),
    "train_large": range(31, 127),
    "valid_seen": range(7, 31),
    "valid_unseen": range(1, 7),
}
_BASINS = {"SinkBasin": "Sink", "BathtubBasin": "Bathtub"}
_WALKTHROUGH_LIMIT = 30


class _Unsolvable(Exception):
    """The random draw allows no game of this task type; the caller draws again."""


@dataclass(frozen=True, slots=True)
class _Placed:
    """An entity of a scene: PDDL id, type, and location id. The location is empty for objects."""

    id: str
    type: str
    location: str


def generate(split: str, index: int) -> dict[str, object]:
    """Return the game document of task `index` of `split`. Raises KeyError if the split is unknown.

    Example:
        document = generate("valid_unseen", 0)
        parse_game(document).goal_text  # "put a book in desk."
        document["walkthrough"]  # ["go to bed 1", "take book 2 from bed 1", "go to desk 1", "move book 2 to desk 1"]
    """
    scenes = _SCENES[split]
    task_type = TASK_TYPES[index % len(TASK_TYPES)]
    for attempt in range(1000):
        rng = random.Random(f"alfworld game {split} {index} {attempt}")
        rooms = [name for name, room in ROOMS.items() if task_type in room.tasks]
        name = rng.choice(rooms)
        try:
            return _game(rng, name, rng.choice(scenes), task_type, f"{split}_{index}")
        except _Unsolvable:
            continue
    raise AssertionError(f"no solvable game found in 1000 draws: {split} {index}")


@functools.lru_cache(maxsize=256)
def _scene(name: str, number: int) -> tuple[_Placed, ...]:
    """Return the receptacles of a scene. Neighbouring openable ones (drawers, cabinets) sometimes share a location."""
    rng = random.Random(f"alfworld scene {name} {number}")
    size = 1.0 if number in _SCENES["train_large"] else rng.choice(SCENE_SIZES)
    placed: list[_Placed] = []
    for kind, (least, most) in ROOMS[name].receptacles.items():
        for _ in range(rng.randint(least, least + round(size * (most - least)))):
            shared = bool(placed) and placed[-1].type == kind and kind in OPENABLE and rng.random() < 0.15
            location = placed[-1].location if shared else _location(rng)
            placed.append(_Placed(_identity(rng, kind), kind, location))
    return tuple(placed)


def _game(rng: random.Random, name: str, number: int, task_type: str, title: str) -> dict[str, object]:
    """Draw one game in scene `number` of a room. Raises _Unsolvable.

    The order of the random draws is part of the format: another order makes other games of every split.
    """
    room, receptacles = ROOMS[name], _scene(name, number)
    kinds = sorted(rng.sample(sorted(room.objects), min(len(room.objects), len(receptacles) + rng.randint(0, 4))))
    objects = [_Placed(_identity(rng, kind), kind, "") for kind in kinds for _ in _count(rng, room, kind)]
    fits = domain().fits
    home: dict[str, _Placed] = {}
    for thing in objects:
        kinds = sorted({r.type for r in receptacles if thing.type in fits[r.type]})
        if kinds:
            kind = rng.choice(kinds)
            home[thing.id] = rng.choice([r for r in receptacles if r.type == kind])
    objects = [thing for thing in objects if thing.id in home]
    lamp = _place_lamp(rng, room, receptacles, home)
    if lamp is not None:
        objects.append(lamp)
    target_object, target = _choose_goal(rng, task_type, receptacles, objects, home, lamp)
    document = {
        "pddl_domain": domain().pddl,
        "grammar": domain().grammar.replace("UNKNOWN GOAL", _goal_text(rng, task_type, target_object, target)),
        "pddl_problem": _problem(rng, room, receptacles, objects, home, lamp, task_type, target_object, target, title),
        "solvable": True,
        "walkthrough": [],
    }
    document["walkthrough"] = _solve(document)
    return document


def _solve(document: Mapping[str, object]) -> list[str]:
    """Return the commands with which the planner wins. Raises _Unsolvable."""
    play = NativeGame(parse_game(document))
    if play.won:
        raise _Unsolvable
    planner = Planner(play)
    commands: list[str] = []
    while not play.won:
        command = planner.next_command()
        if command is None or len(commands) >= _WALKTHROUGH_LIMIT:
            raise _Unsolvable
        play.step(command)
        commands.append(command)
    return commands


def _choose_goal(
    rng: random.Random,
    task_type: str,
    receptacles: Sequence[_Placed],
    objects: Sequence[_Placed],
    home: Mapping[str, _Placed],
    lamp: _Placed | None,
) -> tuple[str, str]:
    """Draw the goal: object type, and receptacle type or lamp type. Raises _Unsolvable.

    An object of the type never starts in a receptacle of the target type, so no game starts solved.
    """
    rules = domain()
    kinds = sorted({thing.type for thing in objects if thing is not lamp})
    if task_type == "look_at_obj_in_light":
        if lamp is None:
            raise _Unsolvable
        return rng.choice(kinds), lamp.type
    able = {
        "pick_clean_then_place_in_recep": "Cleanable",
        "pick_heat_then_place_in_recep": "Heatable",
        "pick_cool_then_place_in_recep": "Coolable",
    }.get(task_type)
    needed = 2 if task_type == "pick_two_obj_and_place" else 1
    choices = []
    for kind in kinds:
        homes = [home[thing.id].type for thing in objects if thing.type == kind]
        if len(homes) < needed or (able and kind not in rules.able[able]):
            continue
        for place in sorted({r.type for r in receptacles}):
            if kind in rules.fits[place] and place not in homes:
                choices.append((kind, place))
    if not choices:
        raise _Unsolvable
    return rng.choice(choices)


def _place_lamp(
    rng: random.Random, room: RoomKind, receptacles: Sequence[_Placed], home: dict[str, _Placed]
) -> _Placed | None:
    places = [r for r in receptacles if r.type in LAMP_PLACES]
    if "look_at_obj_in_light" not in room.tasks or not places:
        return None
    kind = LAMPS[rng.random() < 0.25]  # a desk lamp in three games of four
    lamp = _Placed(_identity(rng, kind), kind, "")
    home[lamp.id] = rng.choice(places)
    return lamp


def _goal_text(rng: random.Random, task_type: str, kind: str, target: str) -> str:
    template = rng.choice(domain().goals[task_type].templates)
    return template.format(obj=kind.lower(), recep=target.lower(), toggle=target.lower(), mrecep="")


def _problem(
    rng: random.Random,
    room: RoomKind,
    receptacles: Sequence[_Placed],
    objects: Sequence[_Placed],
    home: Mapping[str, _Placed],
    lamp: _Placed | None,
    task_type: str,
    target_object: str,
    target: str,
    title: str,
) -> str:
    """Return the PDDL problem: declarations, initial facts and goal."""
    rules = domain()
    start = _location(rng)
    scenery = [_Placed(_identity(rng, kind), kind, _location(rng)) for kind in room.scenery]
    places = sorted({r.location for r in receptacles} | {s.location for s in scenery} | {start})
    things = [*objects, *scenery]
    receptacle_types = sorted({r.type for r in receptacles})
    object_types = sorted({o.type for o in things})

    declared = ["agent1 - agent"]
    declared += [f"{kind}Type - rtype" for kind in receptacle_types]
    declared += [f"{kind}Type - otype" for kind in object_types]
    declared += [f"{r.id} - receptacle" for r in receptacles]
    declared += [f"{o.id} - object" for o in things]
    declared += [f"{place} - location" for place in places]

    facts = [f"receptacleType {r.id} {r.type}Type" for r in receptacles]
    facts += [f"objectType {o.id} {o.type}Type" for o in things]
    facts += [
        f"canContain {place}Type {kind}Type"
        for place in receptacle_types
        for kind in object_types
        if kind in rules.fits[place]
    ]
    for o in objects:
        facts += [f"pickupable {o.id}"] if o is not lamp else [f"toggleable {o.id}"]
        facts += [f"isReceptacleObject {o.id}"] if o.type in rules.movable_receptacles else []
        for action in ("Cleanable", "Heatable", "Coolable", "Sliceable"):
            facts += [f"{action.lower()} {o.id}"] if o.type in rules.able[action] else []
    facts += [f"openable {r.id}" for r in receptacles if r.type in OPENABLE]
    facts += [f"atLocation agent1 {start}"]
    facts += [f"inReceptacle {o.id} {home[o.id].id}" for o in objects]
    facts += [f"receptacleAtLocation {r.id} {r.location}" for r in receptacles]
    facts += [f"objectAtLocation {o.id} {home[o.id].location}" for o in objects]
    facts += [f"objectAtLocation {s.id} {s.location}" for s in scenery]

    goal = rules.goals[task_type].pddl.format(obj=target_object, recep=target, toggle=target).replace("#", "-")
    head = f"(define (problem {title})\n(:domain alfred)\n(:objects\n" + "\n".join(declared) + "\n)\n"
    return head + "(:init\n" + "\n".join(f"({fact})" for fact in facts) + "\n)\n" + goal


def _count(rng: random.Random, room: RoomKind, kind: str) -> range:
    least, most = room.objects[kind]
    return range(rng.randint(least, most))


def _identity(rng: random.Random, kind: str) -> str:
    """Draw an id in the form of ALFRED's simulator: type and position.

    Example:
        _identity(random.Random(1), "SinkBasin")
        # "Sink_bar__minus_02_dot_93_bar__plus_01_dot_69_bar__plus_02_dot_11_bar_SinkBasin"
    """
    axes = (rng.uniform(-4, 4), rng.uniform(0, 2), rng.uniform(-4, 4))
    position = "".join(
        f"_bar__{'plus' if axis >= 0 else 'minus'}_{abs(axis):05.2f}".replace(".", "_dot_") for axis in axes
    )
    base = _BASINS.get(kind)
    return f"{base}{position}_bar_{kind}" if base else f"{kind}{position}"


def _location(rng: random.Random) -> str:
    """Draw a location id: grid position, rotation, and camera angle, such as `loc_bar__minus_8_bar_6_bar_0_bar_45`."""
    x, z = (rng.randint(-12, 12) for _ in range(2))
    numbers = (x, z, rng.randint(0, 3), rng.choice((15, 30, 45, 60)))
    return "loc" + "".join(f"_bar_{n}" if n >= 0 else f"_bar__minus_{-n}" for n in numbers)
