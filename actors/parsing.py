"""Parse a response into an action, and decide whether it counts as valid.

A parser is a function `(response, admissible, form) -> ParsedAction`: the action as it is written, and whether the
response has the form that the template asks for. What follows is the same for all parsers: `form` and the run's rule of
validity are applied to the action (`parse_action`). A plug-in may take parameters of its own as `params`.

Where an action begins and ends:
- `think`: between the tags `<action>` and `</action>` that come after the thought. What is between them is the action,
  white space and line breaks included. It may hold tags itself: the action ends at the last `</action>`, and an
  `<action>` begins another one only where the one before is closed.
- `compact`: the whole response, without the one space that the prompt asks for before it.

Invariants
- Every response yields an action to send: the environment decides what an odd one does.
- Only the environment's `ActionForm` changes an action, and nothing is cut off.
- `well_formed` asks for the template's form alone; `admissible` also for one of the environment's admissible actions.
  One of those may leave a text open, such as `search[<your query>]`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from actors.gateway.messages import Message
from env_servers import free_text
from env_servers.protocol import ActionForm

OPEN, CLOSE = "<action>", "</action>"

_TAG = re.compile(f"{OPEN}|{CLOSE}")
_THOUGHT = re.compile(rf"\s*<think>.*?</think>\s*(?={OPEN})", re.DOTALL)


PARSERS: Mapping[str, str] = MappingProxyType(
    {"think": "actors.parsing:parse_think", "compact": "actors.parsing:parse_compact"}
)
"""Names that `prompt.parser` may have instead of `module:name`."""


@dataclass(frozen=True, slots=True)
class ParsedAction:
    """An action, and whether the response was valid. `answer`: the response where it is a message."""

    action: str
    valid: bool
    answer: Message | None = None


Parser = Callable[[str, Sequence[str] | None, ActionForm], ParsedAction]
"""From a response, the admissible actions where they are known, and what is done to an action before it is sent."""


def parse_action(
    parser: Parser | Literal["think", "compact"],
    response: str,
    admissible: Sequence[str] | None,
    validity: Literal["admissible", "well_formed"],
    form: ActionForm = "as_written",
) -> ParsedAction:
    """The action of a response, and whether it is valid: of the parser's form, and admissible where that is asked for.

    Example, `think` with the admissible actions `look` and `take pen 1`:
        <think>hm</think><action>look</action>   look, valid
        look                                     look, invalid: no tags
        <think>hm</think><action>fly</action>    fly, valid only where `validity` is `well_formed`
    """
    parse = _BUILT_IN[parser] if isinstance(parser, str) else parser
    return judged(parse(response, admissible, form), admissible, validity, form)


def judged(
    found: ParsedAction,
    admissible: Sequence[str] | None,
    validity: Literal["admissible", "well_formed"],
    form: ActionForm,
) -> ParsedAction:
    """An action that was found in a response, by the environment's form and the run's rule of validity."""
    action = shaped(found.action, form)
    listed = admissible is not None and is_admissible(action, admissible)
    known = validity == "well_formed" or admissible is None or listed
    return replace(found, action=action, valid=found.valid and known and (listed or bool(action.strip())))


def parse_think(response: str, admissible: Sequence[str] | None, form: ActionForm) -> ParsedAction:
    """The last action between tags; well-formed: one thought and one action. Without one the whole response."""
    thought = _THOUGHT.match(response)
    actions = _actions(response, thought.end() if thought else 0)
    if not actions:
        return ParsedAction(response, False)
    begin, end = actions[-1]
    rest = response[end + len(CLOSE) :]
    return ParsedAction(response[begin:end], thought is not None and len(actions) == 1 and not rest.strip())


def parse_compact(response: str, admissible: Sequence[str] | None, form: ActionForm) -> ParsedAction:
    """The whole response; well-formed: of one line, unless `form` is `as_written`."""
    return ParsedAction(response.removeprefix(" "), form == "as_written" or "\n" not in response.strip())


_BUILT_IN: Mapping[str, Parser] = MappingProxyType({"think": parse_think, "compact": parse_compact})


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
