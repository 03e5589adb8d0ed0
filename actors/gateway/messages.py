"""Messages of a conversation, as the gateway's pieces hand them to one another. Depends on nothing.

Invariants
- A message is immutable. Its identity (`identity`) is what clients reliably send back: role, content without outer
  white space, and tool calls as name and canonical arguments. Reasoning and the ids of tool calls are not part of it:
  clients drop or renumber them.
- Arguments of a tool call are kept as the JSON text that was written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Role = Literal["system", "user", "assistant", "tool"]

Tool = Mapping[str, object]
"""A tool as requests declare it: `{"type": "function", "function": {"name": …, "parameters": …}}`."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool by the policy.

    Attributes:
        name: of the tool.
        arguments: JSON text, as written.
        id: by which the result refers to it; empty if the model wrote none.
    """

    name: str
    arguments: str = "{}"
    id: str = ""

    def parsed(self) -> Mapping[str, object] | None:
        """The arguments; None if they are not a JSON object."""
        try:
            found = json.loads(self.arguments)
        except (ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None


@dataclass(frozen=True, slots=True)
class Message:
    """One message.

    Attributes:
        role: whose it is.
        content: its text.
        reasoning: an answer's thought, where it was separated from the content.
        tool_calls: of an answer.
        tool_call_id: of a tool's message: the call that it answers.
        name: of a tool's message: the tool, if known.
    """

    role: Role
    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""


def identity(message: Message) -> bytes:
    """What makes a message the same as another one, as bytes.

    Example: the arguments `{"b": 1, "a": 2}` and `{"a":2,"b":1}` are the same.
    """
    content = message.content.strip()
    if not message.tool_calls:
        said = f"{message.role} {content}"
    else:
        calls = [(call.name, canonical(call.arguments)) for call in message.tool_calls]
        said = f"{message.role}+{len(content)} {content}{json.dumps(calls)}"
    return said.encode("utf-8", "surrogatepass")


def canonical(arguments: str) -> str:
    """JSON text with sorted keys and without white space; text that is no JSON as it is, without outer white space."""
    try:
        found = json.loads(arguments)
        return json.dumps(found, sort_keys=True, separators=(",", ":"))
    except (ValueError, RecursionError):
        return arguments.strip()


def joined(answers: Sequence[Message]) -> Message:
    """Adjacent assistant messages as one. Some clients send the text and the calls of an answer as two messages."""
    if len(answers) == 1:
        return answers[0]
    return replace(
        answers[0],
        content=_lines(answer.content for answer in answers),
        reasoning=_lines(answer.reasoning for answer in answers),
        tool_calls=tuple(call for answer in answers for call in answer.tool_calls),
    )


def _lines(texts: Iterable[str]) -> str:
    return "\n".join(text.strip() for text in texts if text.strip())
