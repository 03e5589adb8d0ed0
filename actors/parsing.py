"""Turns a response into an action and says whether it counts as valid.

Where an action begins and ends:
- `think`: between the tags `<action>` and `</action>` that come after the thought. What is between them is the action,
  white space and line breaks included. It may hold tags itself: the action ends at the last `</action>`, and an
  `<action>` begins another one only where the one before is closed.
- `compact`: the whole response, without the one space that the prompt asks for before it.

Invariants
- Whatever the response, there is an action to send: the environment decides what an odd one does.
- Nothing in an action is changed but by the environment's `ActionForm`, and nothing is cut off.
- `well_formed` asks for the template's form alone; `admissible` also for one of the environment's admissible actions.
  One of those may leave a text open, such as `search[<your query>]`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from env_servers import free_text
from env_servers.protocol import ActionForm

OPEN, CLOSE = "<action>", "</action>"

_TAG = re.compile(f"{OPEN}|{CLOSE}")
_THOUGHT = re.compile(rf"\s*<think>.*?</think>\s*(?={OPEN})", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ParsedAction:
    action: str
    valid: bool


def parse_action(
    template: Literal["think", "compact"],
    response: str,
    admissible: Sequence[str] | None,
    validity: Literal["admissible", "well_formed"],
    form: ActionForm = "as_written",
) -> ParsedAction:
    """The action of a response.

    `think` takes the last action; a response is well-formed when it is one thought and one action. Without one the
    whole response is sent. `compact` is well-formed when there is an action, of one line unless `form` is `as_written`.
    """
    text, well_formed = _think(response) if template == "think" else (response.removeprefix(" "), True)
    action = shaped(text, form)
    if template == "compact" and form != "as_written":
        well_formed = "\n" not in response.strip()
    listed = admissible is not None and is_admissible(action, admissible)
    known = validity == "well_formed" or admissible is None or listed
    return ParsedAction(action, well_formed and known and (listed or bool(action.strip())))


def shaped(action: str, form: ActionForm) -> str:
    """The action as its environment wants it.

    Example: `" Go  North\\n"` is `"Go North"` in one line, `"go north"` in lower case, and itself as written.
    """
    if form == "as_written":
        return action
    line = " ".join(action.split())
    return line.lower() if form == "lower_case" else line


def is_admissible(action: str, admissible: Sequence[str]) -> bool:
    """Whether an action is one of those that are admissible, or one that an admissible action with open text allows."""
    return action in admissible or any(
        free_text.fits(action, known) for known in admissible if free_text.is_open(known)
    )


def _think(response: str) -> tuple[str, bool]:
    """The last action of a response, and whether the response is one thought and one action."""
    thought = _THOUGHT.match(response)
    actions = _actions(response, thought.end() if thought else 0)
    if not actions:
        return response, False
    begin, end = actions[-1]
    rest = response[end + len(CLOSE) :]
    return response[begin:end], thought is not None and len(actions) == 1 and not rest.strip()


def _actions(response: str, start: int) -> list[tuple[int, int]]:
    """Where the actions from `start` on begin and end, their tags not included.

    Example: `<action>a</action><action>b</action>` are two, `<action>print("</action>")</action>` is one.
    """
    actions: list[tuple[int, int]] = []
    begin, depth = -1, 0
    for tag in _TAG.finditer(response, start):
        if tag.group() == OPEN:
            if depth <= 0:
                begin, depth = tag.end(), 0
            depth += 1
        elif begin >= 0:
            depth -= 1
            if actions and actions[-1][0] == begin:
                actions.pop()
            actions.append((begin, tag.start()))
    return actions
