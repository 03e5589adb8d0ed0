"""ALFWorld's rules as data: PDDL domain, grammar, goals, allowed placements, and actions that objects allow."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from env_servers.alfworld.package import alfworld_module, alfworld_text
from env_servers.alfworld.problem import TASK_TYPES


@dataclass(frozen=True, slots=True)
class Goal:
    """The goal of one task type.

    Attributes:
        pddl: goal formula with the placeholders {obj}, {recep} and {toggle}; `#` stands for `-`.
        templates: goal sentences with the same placeholders.
    """

    pddl: str
    templates: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Domain:
    """ALFWorld's rules, independent of any game.

    Attributes:
        pddl: text of the PDDL domain.
        grammar: text of the grammar that writes the observations.
        goals: task type → goal.
        fits: receptacle type → object types that it may hold.
        able: `Cleanable`, `Heatable`, `Coolable`, `Sliceable` → object types with that property.
        movable_receptacles: object types that hold other objects, such as a mug.
    """

    pddl: str
    grammar: str
    goals: Mapping[str, Goal]
    fits: Mapping[str, frozenset[str]]
    able: Mapping[str, frozenset[str]]
    movable_receptacles: frozenset[str]


ABLE = ("Cleanable", "Heatable", "Coolable", "Sliceable")


@functools.cache
def domain() -> Domain:
    """Return the rules, read once. Raises TaskError if the `alfworld` package is missing and cannot be downloaded."""
    constants, goals = alfworld_module("gen.constants"), alfworld_module("gen.goal_library").gdict
    return Domain(
        pddl=alfworld_text("alfred.pddl"),
        grammar=alfworld_text("alfred.twl2"),
        goals={task: Goal(goals[task]["pddl"], tuple(goals[task]["templates"])) for task in TASK_TYPES},
        fits={place: frozenset(kinds) for place, kinds in constants.VAL_RECEPTACLE_OBJECTS.items()},
        able={action: frozenset(constants.VAL_ACTION_OBJECTS[action]) for action in ABLE},
        movable_receptacles=frozenset(constants.MOVABLE_RECEPTACLES_SET),
    )
