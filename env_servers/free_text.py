"""Admissible actions with a placeholder for a free text, such as `search[<your query>]`."""

from __future__ import annotations

import random

from env_servers.protocol import FREE_TEXT, StepResult

_WORDS = 3


def is_open(action: str) -> bool:
    """Whether the action has a placeholder."""
    return FREE_TEXT in action


def fits(action: str, known: str) -> bool:
    """Whether `action` is `known` with a text in the place of its placeholder.

    Example: `fits("search[red shoes]", "search[<your query>]")` is True; `search[]` does not fit.
    """
    before, _, after = known.partition(FREE_TEXT)
    return action.startswith(before) and action.endswith(after) and len(action) > len(before) + len(after)


def fill(action: str, seen: StepResult, rng: random.Random) -> str:
    """Replace the placeholder by random words of the goal or, without a goal, of the observation.

    An action without a placeholder is returned unchanged.
    """
    if not is_open(action):
        return action
    words = str(seen.facts.get("goal") or seen.observation).split() or ["something"]
    return action.replace(FREE_TEXT, " ".join(rng.sample(words, min(_WORDS, len(words)))))
