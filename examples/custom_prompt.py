"""A prompt of your own: what the policy reads before each action, and how its response becomes an action.

    anchorage train configs/alfworld.yaml model.path=FOLDER \
      prompt.template=./examples/custom_prompt.py:react prompt.parser=./examples/custom_prompt.py:last_line

The template asks for a thought and a last line `Action: …`, in the manner of ReAct (arXiv 2210.03629). Both functions
are checked before a run starts. See docs/extending.md.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pydantic import BaseModel

from actors.parsing import ParsedAction
from actors.templates import History
from env_servers.protocol import ActionForm, StepResult

_LAST_LINE = re.compile(r"(?:\A|\n)Action: (.+?)\s*\Z")


class Params(BaseModel, extra="forbid"):
    role: str = "You act in a text environment."
    """The prompt's first line, as in `prompt.params.role=…`."""


def react(goal: str | None, history: History, steps_taken: int, state: StepResult, params: Params) -> str:
    """Return the prompt's text; the tokenizer's chat template is applied to it afterwards.

    `history` holds the last `prompt.history_length` of the `steps_taken` steps, oldest first.
    """
    lines = [params.role]
    if goal:
        lines.append(f"Task: {goal}")
    for past in history:
        lines += [f"Observation: {past.observation}", f"Action: {past.action}"]
    lines.append(f"Observation: {state.observation}")
    if state.admissible is not None:
        lines.append(f"Possible actions: {'; '.join(state.admissible)}")
    lines.append(f"This is step {steps_taken + 1}. Write a thought, then one last line: Action: the action")
    return "\n".join(lines)


def last_line(response: str, admissible: Sequence[str] | None, form: ActionForm) -> ParsedAction:
    """Return the action of the last line; without one, the whole response as an invalid action.

    Example: `The desk first.\\nAction: go to desk 1` is the action `go to desk 1`.
    """
    found = _LAST_LINE.search(response)
    return ParsedAction(response, False) if found is None else ParsedAction(found[1], True)
