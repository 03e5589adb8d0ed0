"""The graph of a group: anchor states as nodes, steps as edges, and how far each state is from the goal.

Invariants
- Graphs of different groups share no node and no edge.
- The goal is no node of its own: a step that wins leads to it.

Example: episodes `A B C won` and `A B A`, which was cut off in a state D that nobody acted in.

    edges       A→B  B→C  C→goal  A→B  B→A  A→D
    distance    A 3  B 2  C 1     D 4: it cannot reach the goal, so it is one further than the furthest that can
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from learner.advantages.rows import Flags, Ids, StepRows, dense, transitions

LOST = -1
"""Distance of a state from which no known step leads on to the goal."""


@dataclass(frozen=True, slots=True)
class Distances:
    """Fewest steps to the goal, int64 [N] each.

    Attributes:
        here: from the state that each row's action was chosen in.
        there: from the state that it led to; 0 at the goal.
    """

    here: Ids
    there: Ids


def distances(rows: StepRows, won: Flags) -> Distances:
    """Distances of all rows within their groups; a state that cannot reach the goal is one further than the furthest.

    Args:
        rows: of complete groups.
        won: bool [N], the row's episode reached the goal.
    """
    source, target, last = transitions(rows)
    group, goal = dense(rows.group), last & won
    known = _steps_to_goal(source, target, group, goal)
    here = known[source]
    there = np.where(goal, 0, np.where(target >= 0, known[target], LOST))
    furthest = np.zeros(int(group.max(initial=0)) + 1, dtype=np.int64)
    np.maximum.at(furthest, group, here)
    away = 1 + furthest[group]
    return Distances(*(np.where(found == LOST, away, found) for found in (here, there)))


def _steps_to_goal(source: Ids, target: Ids, group: Ids, goal: Flags) -> Ids:
    """int64 [nodes]: distance of each node; `LOST` if it cannot reach the goal.

    Breadth first from the goals of all groups at once: each round looks at the edges of nodes that have no distance
    yet, and leaves out the groups in which the round before found none.
    """
    known = np.full(int(max(source.max(initial=0), target.max(initial=0))) + 1, LOST, dtype=np.int64)
    known[source[goal]] = 1
    going = np.zeros(int(group.max(initial=0)) + 1, dtype=np.bool_)
    going[group[goal]] = True
    distance = 1
    while going.any():
        open_ = going[group] & (target >= 0) & (known[source] == LOST)
        source, target, group = source[open_], target[open_], group[open_]
        reaches = known[target] == distance
        distance += 1
        known[source[reaches]] = distance
        going[:] = False
        going[group[reaches]] = True
    return known
