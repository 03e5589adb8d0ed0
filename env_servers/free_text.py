"""Admissible actions that leave a text open, such as `search[<your query>]`."""

from __future__ import annotations

import random

from env_servers.protocol import FREE_TEXT, StepResult

_WORDS = 3


def is_open(action: str) -> bool:
    """Whether the action has a place for a text."""
    return FREE_TEXT in action


def fits(action: str, known: str) -> bool:
    """Whether `action` is the open action `known` with a text in its place."""
    before, _, after = known.partition(FREE_TEXT)
    return action.startswith(before) and action.endswith(after) and len(action) > len(before) + len(after)


def fill(action: str, seen: StepResult, rng: random.Random) -> str:
    """The action with some words of the goal, or of what is read, in the place of its text; others as they are."""
    if not is_open(action):
        return action
    words = str(seen.facts.get("goal") or seen.observation).split() or ["something"]
    return action.replace(FREE_TEXT, " ".join(rng.sample(words, min(_WORDS, len(words)))))
