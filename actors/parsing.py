"""Turns a response into an action and says whether it counts as valid.

Invariants
- Whatever the response, there is an action to send: the environment decides what an odd one does.
- `well_formed` asks for the template's form alone; `admissible` also for one of the environment's admissible actions.
  One of those may leave a text open, such as `search[<your query>]`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from env_servers import free_text

MAX_ACTION_CHARS = 512

_ACTION = re.compile(r"<action>(.*?)</action>", re.DOTALL)
_THINK_THEN_ACTION = re.compile(r"\s*<think>.*?</think>\s*<action>[^<>]*</action>\s*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ParsedAction:
    action: str
    valid: bool


def parse_action(
    template: Literal["think", "compact"],
    response: str,
    admissible: Sequence[str] | None,
    validity: Literal["admissible", "well_formed"],
) -> ParsedAction:
    """The action of a response, at most `MAX_ACTION_CHARS` long.

    `think` takes the last `<action>…</action>`, lower-cased as published, and is well-formed when exactly one thought
    and one action make up the response. `compact` takes the whole response and is well-formed when it is one line.
    """
    if template == "think":
        found = _ACTION.findall(response)
        text = found[-1].lower() if found else response[-MAX_ACTION_CHARS:]
        well_formed = len(found) == 1 and _THINK_THEN_ACTION.fullmatch(response) is not None
    else:
        text = response
        well_formed = bool(response.strip()) and "\n" not in response.strip()
    action = " ".join(text.split())[:MAX_ACTION_CHARS]
    known = validity == "well_formed" or admissible is None or is_admissible(action, admissible)
    return ParsedAction(action, well_formed and bool(action) and known)


def is_admissible(action: str, admissible: Sequence[str]) -> bool:
    """Whether an action is one of those that are admissible, or one that an admissible action with open text allows."""
    return action in admissible or any(
        free_text.fits(action, known) for known in admissible if free_text.is_open(known)
    )
