"""Plain text on our side, typed actions and observations on that of a foreign OpenEnv server.

An action text goes into the action's text field; a text that is a JSON object is the action itself. A server of tools
gets `tool[argument]`, where the argument is the tool's only text, or a JSON object of all its arguments.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from env_servers.client_interface import RequestRejected, one_line
from env_servers.environment import Observation

_NOT_CONTENT = frozenset({"metadata", "type", "done", "reward"})
_TEXT_FIELDS = ("text", "observation", "message", "echoed_message", "output", "result", "stdout", "content")
_CHOICE_FIELDS = ("admissible_actions", "available_actions", "legal_actions", "valid_actions")
_CALL = re.compile(r"\s*([A-Za-z_][\w.-]*)\s*\[(.*)\]\s*", re.DOTALL)
_TEXTS: TypeAdapter[list[str]] = TypeAdapter(list[str])


class Tool(BaseModel):
    """A tool that a server offers."""

    name: str
    description: str = ""
    input_schema: dict[str, Any] = Field(default_factory=dict)

    @property
    def text_argument(self) -> str | None:
        """The argument that a plain text goes into, where there is no doubt."""
        return _text_field(self.input_schema)


@dataclass(frozen=True)
class ActionMapping:
    """How an action text becomes an action.

    Attributes:
        schema: the server's JSON schema of actions.
        text_field: the field that takes the text; none: the schema's only text.
    """

    schema: Mapping[str, Any]
    text_field: str | None = None

    @property
    def calls_tools(self) -> bool:
        return {"tool_name", "arguments"} <= set(self.schema.get("properties", {}))

    def action(self, text: str, tools: Sequence[Tool]) -> dict[str, Any]:
        """Raises RequestRejected where the text cannot be an action."""
        given = _json_object(text)
        if self.calls_tools:
            return {"type": "call_tool", **given} if given is not None else _call(text, tools)
        if given is not None:
            return given
        name = self.text_field or _text_field(self.schema)
        if name is None:
            fields = ", ".join(sorted(self.schema.get("properties", {}).keys() - _NOT_CONTENT))
            raise RequestRejected(f"the server's actions have the fields {fields}: write them as a JSON object")
        return {name: text}


def observe(data: Mapping[str, Any], text_field: str | None = None) -> Observation:
    """An observation message's `data` as an observation of ours. Its text is `text_field`, or what looks like it.

    Raises RequestRejected where the reward is no finite number.
    """
    seen = data.get("observation")
    seen = seen if isinstance(seen, Mapping) else {}
    done = bool(data.get("done"))
    truncated = done and seen.get("truncated") is True and seen.get("terminated") is not True
    return Observation(
        text=_text_of(seen, text_field),
        reward=_reward(data.get("reward")),
        terminated=done and not truncated,
        truncated=truncated,
        admissible=_choices(seen),
        facts=_facts(seen),
    )


def introduce(tools: Sequence[Tool]) -> str:
    """What an agent is told of the tools."""
    return "\n".join(
        f"{tool.name}[{tool.text_argument or 'JSON object'}]: {' '.join(tool.description.split())}" for tool in tools
    )


def _call(text: str, tools: Sequence[Tool]) -> dict[str, Any]:
    match = _CALL.fullmatch(text)
    names = ", ".join(tool.name for tool in tools)
    if match is None:
        raise RequestRejected(f"an action must be tool[argument], with one of the tools {names}")
    tool = next((tool for tool in tools if tool.name == match[1]), None)
    if tool is None:
        raise RequestRejected(f"there is no tool {match[1]!r}, only {names}")
    arguments = _json_object(match[2])
    if arguments is None:
        if tool.text_argument is None:
            raise RequestRejected(f"the tool {tool.name} takes its arguments as a JSON object: {tool.name}[{{…}}]")
        arguments = {tool.text_argument: match[2]}
    return {"type": "call_tool", "tool_name": tool.name, "arguments": arguments}


def _text_field(schema: Mapping[str, Any]) -> str | None:
    """The only required property, else the only text, where that is a text and nothing else is required."""
    properties = {name: p for name, p in schema.get("properties", {}).items() if name not in _NOT_CONTENT}
    texts = [name for name, p in properties.items() if p.get("type") == "string"]
    required = [name for name in schema.get("required", []) if name not in _NOT_CONTENT]
    candidates = required or texts
    return candidates[0] if len(candidates) == 1 and candidates[0] in texts else None


def _json_object(text: str) -> dict[str, Any] | None:
    if not text.lstrip().startswith("{"):
        return None
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _reward(given: object) -> float:
    if given is None:
        return 0.0
    if isinstance(given, (bool, int, float)) and math.isfinite(given):
        return float(given)
    raise RequestRejected(f"the server gave a reward that is no finite number: {one_line(repr(given))}")


def _text_of(seen: Mapping[str, Any], text_field: str | None) -> str:
    if text_field is not None:
        return _as_text(seen.get(text_field, ""))
    error = seen.get("error")
    if isinstance(error, Mapping) and error.get("message"):
        return str(error["message"])
    result = seen.get("result")
    if isinstance(result, Mapping) and "data" in result:
        return _as_text(result["data"])
    texts = {name: value for name, value in seen.items() if isinstance(value, str) and name not in _NOT_CONTENT}
    for name in _TEXT_FIELDS:
        if name in texts:
            return texts[name]
    if len(texts) == 1:
        return next(iter(texts.values()))
    rest = {name: value for name, value in seen.items() if name not in _NOT_CONTENT}
    return _as_text(rest or seen.get("metadata") or "")


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def _choices(seen: Mapping[str, Any]) -> tuple[str, ...] | None:
    for name in _CHOICE_FIELDS:
        try:
            return tuple(sorted(_TEXTS.validate_python(seen[name])))
        except (KeyError, ValidationError):
            continue
    return None


def _facts(seen: Mapping[str, Any]) -> dict[str, object]:
    told = seen.get("facts")
    scalars = {
        name: value
        for name, value in seen.items()
        if name not in _NOT_CONTENT
        and isinstance(value, (bool, int, float))
        and name not in ("terminated", "truncated")
    }
    return {**scalars, **(told if isinstance(told, Mapping) else {})}
