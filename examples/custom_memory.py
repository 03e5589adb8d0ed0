"""A memory and messages of your own: the policy chats with tool calls, and reads a summary instead of all that was.

    anchorage train configs/alfworld.yaml model.path=FOLDER prompt.template=./examples/custom_memory.py:Briefing \
      prompt.reader=tool prompt.memory=./examples/custom_memory.py:Summary prompt.history_length=2

Each prompt has the goal and the summary, then the last two exchanges as they were. The classes are checked before a run
starts; each episode has a memory of its own. See docs/extending.md.
"""

from __future__ import annotations

from pydantic import BaseModel

from actors.chat import ACT, Chat, ChatParams
from actors.gateway.messages import Message
from actors.templates import Exchange, History
from env_servers.protocol import StepResult


class Params(BaseModel, extra="forbid"):
    longest: int = 600
    """Most characters of a summary, as in `prompt.memory_params.longest=…`."""


class Summary:
    """What was last observed after each action, in one line each; the oldest lines are forgotten first."""

    def __init__(self, params: Params) -> None:
        self._longest = params.longest
        self._last: Exchange | None = None
        self._lines: dict[str, str] = {}

    def observe(self, exchange: Exchange) -> None:
        """Keep the first sentence of what came of the action before."""
        if self._last is not None:
            action = self._last.action
            self._lines.pop(action, None)
            self._lines[action] = f"- {action}: {exchange.observation.split('.')[0].strip()}"
        self._last = exchange

    def recall(self, state: StepResult) -> str:
        """Return the summary, as much of its end as fits."""
        text = "\n".join(self._lines.values())[-self._longest :]
        return f"What you know so far:\n{text}" if text else ""


class Briefing(Chat):
    """As the built-in `chat`, with the summary in the system message, where it stands apart from what is seen."""

    tools = (ACT,)

    def __init__(self) -> None:
        super().__init__(ChatParams(admissible=False))

    def messages(self, goal: str | None, history: History, memory: str, state: StepResult) -> list[Message]:
        """Return the conversation of the exchanges that are shown."""
        system, *rest = super().messages(goal, history, "", state)
        return [Message("system", f"{system.content}\n{memory}".strip()), *rest]
