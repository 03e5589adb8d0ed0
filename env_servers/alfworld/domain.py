"""ALFWorld's rules as data: PDDL domain, grammar, goals, and which objects fit where and what can be done with them.

They are unchanged copies from release 0.4.2 of the `alfworld` package (MIT licence, included beside them). That package
depends on TextWorld, whose installation needs a C++ compiler; only the engine `textworld` needs the package itself.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

_DATA = resources.files("env_servers.alfworld") / "alfworld_0_4_2"


@dataclass(frozen=True, slots=True)
class Goal:
    """`pddl` and each of `templates` have placeholders {obj}, {recep}, {toggle}; `#` in `pddl` stands for `-`."""

    pddl: str
    templates: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Domain:
    """`goals` by task type.

    `fits`: receptacle type → object types that it may hold. `able`: `Cleanable`, `Heatable`, `Coolable`, `Sliceable` →
    object types. `movable_receptacles`: object types that hold others, such as a mug.
    """

    pddl: str
    grammar: str
    goals: Mapping[str, Goal]
    fits: Mapping[str, frozenset[str]]
    able: Mapping[str, frozenset[str]]
    movable_receptacles: frozenset[str]


@functools.cache
def domain() -> Domain:
    """The rules, read once."""
    facts = json.loads((_DATA / "facts.json").read_text())
    return Domain(
        pddl=(_DATA / "alfred.pddl").read_text(),
        grammar=(_DATA / "alfred.twl2").read_text(),
        goals={task: Goal(goal["pddl"], tuple(goal["templates"])) for task, goal in facts["goals"].items()},
        fits={place: frozenset(kinds) for place, kinds in facts["receptacle_objects"].items()},
        able={action: frozenset(kinds) for action, kinds in facts["action_objects"].items()},
        movable_receptacles=frozenset(facts["movable_receptacles"]),
    )
