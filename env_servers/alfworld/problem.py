"""Parses an ALFWorld game file into a `Game`: entities, names, initial facts and goal, all static.

A game file is JSON in ALFWorld's format: `pddl_domain`, `grammar`, `pddl_problem`, `solvable`, `walkthrough`.

Invariants
- A `Game` is immutable and may be shared by any number of sessions.
- Entities are numbered by ascending lower-case PDDL id, the order in which TextWorld lists them.
- Names are those of ALFWorld's demangler without shuffling: among ids with one base name, the first id has the highest
  number.
- A file whose domain or grammar is not one of ALFWorld's is rejected: playing it would be subtly wrong.
"""

from __future__ import annotations

import functools
import hashlib
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from env_servers.environment import BrokenTask

TASK_TYPES = (
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
)

# SHA-256 of the domain without comments, and of the grammar without its goal sentence; both without white space.
_DOMAINS = {
    "official": "19173ff725cec7a19423ce0f88d59f3a521f7823fd7a404b813a2ad3392b0efb",
    "alfworld package": "6cbbf3d0d19be02716db87fd6ef0fe64bfd8256a71e9d4553dc79dadc82fcc8c",
}
_GRAMMARS = {
    "official": "8ccb165808cdb9ad7a3cbf7b47d41be8f56e5c55af947de8e574d72cfd6bd90b",
    "alfworld package": "67561ba4096cf4de14ecb4ca1c78973e0a6ae466d31e28d04c468aac0ed247ab",
}

GoalKind = Literal["place", "clean", "heat", "cool", "two", "light"]
_TASK_TYPE: dict[GoalKind, str] = {
    "place": "pick_and_place_simple",
    "light": "look_at_obj_in_light",
    "clean": "pick_clean_then_place_in_recep",
    "heat": "pick_heat_then_place_in_recep",
    "cool": "pick_cool_then_place_in_recep",
    "two": "pick_two_obj_and_place",
}

_PARTS = ("pddl_domain", "grammar", "pddl_problem")
_FACT = re.compile(r"\(\s*(\w+)\s+([^()]*?)\s*\)")
_GOAL_SENTENCE = re.compile(r'"rhs":\s*"Your task is to: (.*?)"')


@dataclass(frozen=True, slots=True)
class Goal:
    """What the agent must achieve.

    Attributes:
        kind: what to do.
        object_type: type of the object to handle.
        target_type: type of the receptacle to fill; for `light`, of the lamp to use.
    """

    kind: GoalKind
    object_type: str
    target_type: str

    @property
    def task_type(self) -> str:
        return _TASK_TYPE[self.kind]


@dataclass(frozen=True, slots=True)
class Receptacle:
    name: str
    type: str
    location: int
    openable: bool


@dataclass(frozen=True, slots=True)
class Thing:
    """An object: every entity that is not a receptacle. `holds` lists the objects inside it (a mug in a bowl)."""

    name: str
    type: str
    pickupable: bool
    cleanable: bool
    heatable: bool
    coolable: bool
    sliceable: bool
    toggleable: bool
    is_receptacle: bool
    holds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Game:
    """The static part of one game. Locations, receptacles and objects are numbers, in id order.

    Attributes:
        goal: what to achieve.
        goal_text: the goal's sentence.
        walkthrough: commands that win.
        start: initial location of the agent.
        receptacles: by number.
        objects: by number.
        receptacles_at: per location, the receptacles there.
        can_contain: (receptacle type, object type) pairs that are allowed.
        cleaner_types: receptacle types that clean.
        placed: initial (object, receptacle) facts.
        lying: initial (object, location) facts.
        opened: receptacles that are open initially.
        clean: objects that are clean initially.
        hot: objects that are hot initially.
        cool: objects that are cool initially.
        ways: per location, the `go to` commands that lead elsewhere, each with its receptacle.
    """

    goal: Goal
    goal_text: str
    walkthrough: tuple[str, ...]
    start: int
    receptacles: tuple[Receptacle, ...]
    objects: tuple[Thing, ...]
    receptacles_at: tuple[tuple[int, ...], ...]
    can_contain: frozenset[tuple[str, str]]
    cleaner_types: frozenset[str]
    placed: tuple[tuple[int, int], ...]
    lying: tuple[tuple[int, int], ...]
    opened: frozenset[int]
    clean: frozenset[int]
    hot: frozenset[int]
    cool: frozenset[int]
    ways: tuple[tuple[tuple[str, int], ...], ...]


def parse_game(document: Mapping[str, object]) -> Game:
    """Build the game from the parsed JSON of a game file.

    Raises:
        BrokenTask: a part is missing, or domain, grammar or goal are not ALFWorld's.

    Example:
        game = parse_game(generate("valid_unseen", 2))
        game.goal                 # Goal(kind="clean", object_type="clothtype", target_type="garbagecantype")
        game.receptacles[6]       # Receptacle(name="sinkbasin 1", type="sinkbasintype", location=11, openable=False)
        game.objects[4].name      # "cloth 2"
        (4, 6) in game.placed     # True: cloth 2 is in sinkbasin 1
    """
    goal, goal_text = read_goal(document)
    domain, grammar, problem = (str(document[key]) for key in _PARTS)
    walkthrough = document.get("walkthrough") or ()
    init = problem.partition("(:goal")[0]
    if "(:init" not in init or not isinstance(walkthrough, Iterable):
        raise BrokenTask("not an ALFWorld game file: no :init, or the walkthrough is not a list")
    _check_rules(domain, grammar)
    facts: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    for predicate, arguments in _FACT.findall(init[init.index("(:init") :].lower()):
        facts[predicate].append(tuple(map(sys.intern, arguments.split())))
    try:
        return _build(facts, goal, goal_text, tuple(map(str, walkthrough)), _cleaners(domain))
    except (KeyError, ValueError, IndexError, StopIteration) as error:
        raise BrokenTask(f"not a playable ALFWorld problem: {type(error).__name__} {error}") from None


def read_goal(document: Mapping[str, object]) -> tuple[Goal, str]:
    """Return the goal of a parsed game file and its sentence. Domain and grammar are not checked.

    Raises:
        BrokenTask: a part is missing, or the goal is not ALFWorld's.
    """
    missing = [key for key in _PARTS if not isinstance(document.get(key), str)]
    if missing:
        raise BrokenTask(f"not an ALFWorld game file: {' and '.join(missing)} missing")
    sentence = _GOAL_SENTENCE.search(str(document["grammar"]))
    goal = str(document["pddl_problem"]).partition("(:goal")[2]
    if sentence is None or not goal:
        raise BrokenTask("not an ALFWorld game file: no goal sentence in the grammar, or no :goal in the problem")
    try:
        return _parse_goal(goal), sentence[1]
    except (KeyError, ValueError) as error:
        raise BrokenTask(f"not a playable ALFWorld problem: {error}") from None


def _check_rules(domain: str, grammar: str) -> None:
    if domain_digest(domain) not in _DOMAINS.values() or grammar_digest(grammar) not in _GRAMMARS.values():
        raise BrokenTask("unknown domain or grammar, not one of ALFWorld's: use alfworld-textworld for this game")


@functools.lru_cache(maxsize=8)
def domain_digest(domain: str) -> str:
    """Identity of a domain: SHA-256 of its text without comments and white space."""
    return _digest(re.sub(r";[^\n]*", "", domain))


def grammar_digest(grammar: str) -> str:
    """Identity of a grammar: SHA-256 of its text without its goal sentence and white space."""
    return _digest(_GOAL_SENTENCE.sub("", grammar))


def _digest(text: str) -> str:
    return hashlib.sha256("".join(text.split()).encode()).hexdigest()


@functools.lru_cache(maxsize=8)
def _cleaners(domain: str) -> frozenset[str]:
    """Receptacle types that clean. The published games and the package's domain disagree about sinks."""
    action = re.sub(r";[^\n]*", "", domain).partition("(:action CleanObject")[2].partition("(:action")[0]
    return frozenset(kind.lower() for kind in re.findall(r"\(receptacleType \?r (\w+)\)", action))


def _parse_goal(text: str) -> Goal:
    """Parse a goal formula.

    Example:
        _parse_goal("(objectType ?o ClothType) (receptacleType ?r GarbageCanType) (isClean ?o)")
        # Goal(kind="clean", object_type="clothtype", target_type="garbagecantype")
    """
    flat = " ".join(text.split())
    objects = re.findall(r"\(objectType \?(\w+) (\w+)\)", flat)
    targets = re.findall(r"\(receptacleType \?r (\w+)\)", flat)
    if "(isToggled" in flat:
        types = dict(objects)
        return Goal("light", types["o"].lower(), types["ot"].lower())
    kind: GoalKind = "place"
    for predicate, candidate in (("isClean", "clean"), ("isHot", "heat"), ("isCool", "cool"), ("?o2", "two")):
        if predicate in flat:
            kind = candidate  # type: ignore[assignment]
    if len({t for _, t in objects}) != 1 or len(set(targets)) != 1 or len(objects) != (2 if kind == "two" else 1):
        raise ValueError(f"unknown form of goal: {flat[:200]}")
    return Goal(kind, objects[0][1].lower(), targets[0].lower())


def _demangle(ids: Iterable[str]) -> dict[str, str]:
    """Return id → name as ALFWorld's demangler without shuffling assigns them.

    Example:
        _demangle(["drawer_bar__plus_1", "drawer_bar__plus_2", "sink_bar_sinkbasin"])
        # {"drawer_bar__plus_1": "drawer 2", "drawer_bar__plus_2": "drawer 1", "sink_bar_sinkbasin": "sinkbasin 1"}
    """
    bases: dict[str, str] = {}
    for entity in sorted(ids):
        base, bar, _ = entity.partition("_bar_")
        if bar:
            bases[entity] = base + "basin" if "basin" in entity else base
    left = Counter(bases.values())
    names: dict[str, str] = {}
    for entity, base in bases.items():
        names[entity] = f"{base} {left[base]}"
        left[base] -= 1
    return names


def _build(
    facts: Mapping[str, list[tuple[str, ...]]],
    goal: Goal,
    goal_text: str,
    walkthrough: tuple[str, ...],
    cleaners: frozenset[str],
) -> Game:
    """Build the game from its initial facts, grouped by predicate."""
    names = _demangle({argument for rows in facts.values() for row in rows for argument in row})
    receptacle_type = dict(_pairs(facts["receptacletype"]))
    location_of = dict(_pairs(facts["receptacleatlocation"]))
    object_type = dict(_pairs(facts["objecttype"]))
    start = next(location for _, location in facts["atlocation"])
    receptacle_at = _number(set(receptacle_type) & set(location_of))
    object_at = _number(object_type)
    location_at = _number({*location_of.values(), *(at for _, at in facts["objectatlocation"]), start})
    inside = _nested(facts["inreceptacleobject"], object_at)
    flags = {key: {row[0] for row in rows} for key, rows in facts.items()}
    receptacles = tuple(
        Receptacle(names[r], receptacle_type[r], location_at[location_of[r]], r in flags.get("openable", ()))
        for r in receptacle_at
    )
    return Game(
        goal=goal,
        goal_text=goal_text,
        walkthrough=walkthrough,
        start=location_at[start],
        receptacles=receptacles,
        objects=tuple(_thing(o, names, object_type[o], inside.get(o, ()), flags) for o in object_at),
        receptacles_at=_by_location(receptacles, len(location_at)),
        can_contain=frozenset((row[0], row[1]) for row in facts["cancontain"]),
        cleaner_types=cleaners,
        placed=tuple(sorted((object_at[o], receptacle_at[r]) for o, r in _pairs(facts["inreceptacle"]))),
        lying=tuple(sorted((object_at[o], location_at[at]) for o, at in _pairs(facts["objectatlocation"]))),
        opened=frozenset(receptacle_at[r] for r in flags.get("opened", ())),
        clean=frozenset(object_at[o] for o in flags.get("isclean", ())),
        hot=frozenset(object_at[o] for o in flags.get("ishot", ())),
        cool=frozenset(object_at[o] for o in flags.get("iscool", ())),
        ways=_ways(receptacles, len(location_at)),
    )


def _number(ids: Iterable[str]) -> dict[str, int]:
    """Number the ids in ascending order."""
    return {entity: number for number, entity in enumerate(sorted(ids))}


def _nested(rows: Iterable[tuple[str, ...]], object_at: Mapping[str, int]) -> Mapping[str, list[int]]:
    """Return id of an object → the objects inside it, from (inner, outer) facts."""
    inside: dict[str, list[int]] = defaultdict(list)
    for inner, outer in _pairs(rows):
        if inner in object_at:
            inside[outer].append(object_at[inner])
    return inside


def _thing(
    entity: str, names: Mapping[str, str], kind: str, inside: Iterable[int], flags: Mapping[str, set[str]]
) -> Thing:
    return Thing(
        name=names.get(entity, entity),
        type=kind,
        holds=tuple(sorted(inside)),
        **{field: entity in flags.get(flag, ()) for field, flag in _OBJECT_FLAGS.items()},
    )


def _by_location(receptacles: Iterable[Receptacle], locations: int) -> tuple[tuple[int, ...], ...]:
    """Return the receptacles at each location."""
    found: list[list[int]] = [[] for _ in range(locations)]
    for number, receptacle in enumerate(receptacles):
        found[receptacle.location].append(number)
    return tuple(map(tuple, found))


def _ways(receptacles: Sequence[Receptacle], locations: int) -> tuple[tuple[tuple[str, int], ...], ...]:
    """Return the `go to` commands that leave each location, each with its receptacle."""
    commands = [(f"go to {receptacle.name}", number) for number, receptacle in enumerate(receptacles)]
    return tuple(
        tuple(command for command, r in zip(commands, receptacles, strict=True) if r.location != here)
        for here in range(locations)
    )


_OBJECT_FLAGS = {
    "pickupable": "pickupable",
    "cleanable": "cleanable",
    "heatable": "heatable",
    "coolable": "coolable",
    "sliceable": "sliceable",
    "toggleable": "toggleable",
    "is_receptacle": "isreceptacleobject",
}


def _pairs(rows: Iterable[tuple[str, ...]]) -> list[tuple[str, str]]:
    """Return the rows as pairs. Raises ValueError if a row has another length."""
    return [(first, second) for first, second in rows]
