"""Turns: which calls of an episode are one decision, and what each decision earned.

A step is one call of the policy. What was asked in one state of the environment is one turn, however many calls that
took: an agent program may think, ask a sub-agent and act in three calls, and only then does the environment move on.

Invariants
- The rewards of an episode's turns add up to those of its steps, if it has a turn at all.
- An untrained call opens no turn. Its reward belongs to the turn that it names, else to the turn before it, else to the
  first one.

Example: an agent plans and acts in state A, a frozen call summarises, then it acts in B and again in C.

    step       0     1     2       3     4
    turn       0     0     -1      1     -1      as stored: -1 is a turn of its own
    trained    yes   yes   no      yes   yes
    anchor     A     A             B     C
    reward     0     1     0.5     0     10
    valid      yes   no    yes     yes   yes

    number     0     0     -1      1     2
    turns      anchor A, reward 1.5, invalid     anchor B, reward 0, valid     anchor C, reward 10, valid
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.schemas import Step

SHORT_STATE_CHARS = 16
"""What the policy was told in a state is short below this: other states probably say the same."""


@dataclass(frozen=True, slots=True)
class Turns:
    """The T turns of an episode, numbered from 0 in the order of their first calls.

    Attributes:
        number: turn of each of the episode's steps; −1 for an untrained one.
        anchor: of each turn: the state in which its first call was made.
        reward: of each turn: sum over its steps.
        valid: of each turn: whether all its trained calls are valid.
    """

    number: list[int]
    anchor: list[str]
    reward: list[float]
    valid: list[bool]

    def __len__(self) -> int:
        return len(self.anchor)


def turns_of(steps: Sequence[Step]) -> Turns:
    """The turns of an episode's steps."""
    if all(step.turn < 0 and step.trained for step in steps):
        return Turns(
            number=list(range(len(steps))),
            anchor=[step.anchor for step in steps],
            reward=[step.reward for step in steps],
            valid=[step.valid for step in steps],
        )
    found, named = Turns([], [], [], []), dict[int, int]()
    for step in steps:
        if not step.trained:
            found.number.append(-1)
            continue
        number = named.setdefault(step.turn, len(found)) if step.turn >= 0 else len(found)
        found.number.append(number)
        if number == len(found):
            found.anchor.append(step.anchor)
            found.reward.append(0.0)
            found.valid.append(True)
        found.valid[number] &= step.valid
    _add_rewards(steps, found, named)
    return found


def short_states(steps: Sequence[Step]) -> int:
    """Number of turns in whose state the policy was told fewer than `SHORT_STATE_CHARS` characters."""
    opening: dict[int, str] = {}
    for step, number in zip(steps, turns_of(steps).number, strict=True):
        if number >= 0:
            opening.setdefault(number, step.observation)
    return sum(len(text.strip()) < SHORT_STATE_CHARS for text in opening.values())


def _add_rewards(steps: Sequence[Step], found: Turns, named: dict[int, int]) -> None:
    """Add each step's reward to its turn. `named`: number of each turn that has a name."""
    before = 0
    for step, number in zip(steps, found.number, strict=True):
        before = number if number >= 0 else named.get(step.turn, before)
        if found.reward:
            found.reward[before] += step.reward
