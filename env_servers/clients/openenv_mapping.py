"""Maps our plain text to the typed actions and observations of a foreign OpenEnv server.

An action text goes unchanged into the action's text field, JSON included. The exception is a JSON object of exactly the
action's own fields: it is the action itself, and the only form where no single field takes a text. A server of tools
gets `tool[argument]`, where the argument is the tool's only text, or a JSON object of all its arguments.

Example, for a server whose actions have one required text field `code`::

    print(1)             ->  {"code": "print(1)"}
    {"code": "print(1)"} ->  {"code": "print(1)"}
    {"a": 1}             ->  {"code": "{\"a\": 1}"}

and for a server with the tool `echo(message: str)`::

    echo[hello]                ->  {"type": "call_tool", "tool_name": "echo", "arguments": {"message": "hello"}}
    echo[{"message": "hello"}] ->  the same
    say[hello]                 ->  ActionRefused: no tool 'say', the tools are echo
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from env_servers.clients.interface import ActionRefused, RequestRejected
from env_servers.clients.openenv_examples import example
from env_servers.environment import Observation
from env_servers.errors import one_line
from env_servers.protocol import invalid_value, shown_value

_NOT_CONTENT = frozenset({"metadata", "type", "done", "reward"})
_NO_FACTS = frozenset({"accepted", "terminated", "truncated"})
_NOT_THE_ACTIONS_FAULT = frozenset({"transport_error", "timeout"})
_CODE_FIELDS = frozenset({"code", "python", "script", "source", "program"})
_CODE = ("print(1)", "x = 1", "print('hello')", "for i in range(3):\n    print(i)", "len('abc')")
_TEXT_FIELDS = ("text", "observation", "message", "echoed_message", "output", "result", "stdout", "content")
_CHOICE_FIELDS = ("admissible_actions", "available_actions", "legal_actions", "valid_actions")
_CALL = re.compile(r"\s*([A-Za-z_][\w.-]*)\s*\[(.*)\]\s*", re.DOTALL)
_TEXTS: TypeAdapter[list[str]] = TypeAdapter(list[str])


class Tool(BaseModel):
    """A tool that a server offers."""

    name: str
    description: str | None = None
    input_schema: dict[str, Any] = Field(default_factory=dict)

    @property
    def text_argument(self) -> str | None:
        """The argument that takes a plain text; None if there is not exactly one."""
        return _text_field(self.input_schema)


@dataclass(frozen=True)
class ActionMapping:
    """How an action text becomes an action.

    Attributes:
        schema: the server's JSON schema of actions. Not trusted: anything in it may have any type.
        text_field: the field that takes the text; none: the schema's only text.
    """

    schema: Mapping[str, Any]
    text_field: str | None = None

    @property
    def calls_tools(self) -> bool:
        return {"tool_name", "arguments"} <= _properties(self.schema).keys()

    def action(self, text: str, tools: Sequence[Tool]) -> dict[str, Any]:
        """The action of a text.

        Raises:
            ActionRefused: the text is no action.
        """
        given = _json_object(text)
        if self.calls_tools:
            return _call(text, tools) if given is None else _whole_call(given, tools)
        name = self._takes_text
        if given is not None and (name is None or _fits(given, self.schema)):
            return given
        if name is None:
            fields = ", ".join(sorted(_content(self.schema)))
            raise ActionRefused(f"an action is a JSON object with the fields {fields}")
        return {name: text}

    def examples(self, tools: Sequence[Tool], count: int, seed: int) -> list[str]:
        """Valid actions as an agent would write them; empty where the schema only says that an action is a text.

        Raises:
            RequestRejected: the schema is no valid JSON schema.
        """
        try:
            return self._examples(tools, count, random.Random(seed))
        except Exception as error:  # a foreign schema may hold anything anywhere
            reason = one_line(f"{type(error).__name__}: {error}")
            raise RequestRejected(f"the server's action schema cannot be read: {reason}") from error

    def _examples(self, tools: Sequence[Tool], count: int, rng: random.Random) -> list[str]:
        if self.calls_tools:
            calls = (rng.choice(tools) for _ in range(count if tools else 0))
            return [f"{tool.name}[{json.dumps(example(tool.input_schema, rng))}]" for tool in calls]
        name = self._takes_text
        if name is None:
            content = {**self.schema, "properties": _content(self.schema)}
            return [json.dumps(example(content, rng)) for _ in range(count)]
        if name in _CODE_FIELDS:
            return [rng.choice(_CODE) for _ in range(count)]
        of = _properties(self.schema).get(name, {})
        return [str(example(of, rng)) for _ in range(count)] if {"enum", "examples", "const"} & of.keys() else []

    @property
    def _takes_text(self) -> str | None:
        return self.text_field or _text_field(self.schema)


def observe(data: Mapping[str, Any], text_field: str | None = None) -> Observation:
    """Turn the `data` of an observation message into an observation.

    Args:
        data: a foreign server's message.
        text_field: field of the observation that holds its text; none: chosen by the names of its fields.

    Raises:
        RequestRejected: the observation is no object, the reward or a fact is not a finite number, or `done` or `won`
            is neither true nor false.
    """
    seen = data.get("observation")
    if seen is None:
        seen = {}
    if not isinstance(seen, Mapping):
        raise RequestRejected("invalid value: observation is not an object")
    done = data.get("done") or False
    if not isinstance(done, bool):
        raise RequestRejected(f"invalid value: done is {shown_value(done)}, not true or false")
    truncated = done and seen.get("truncated") is True and seen.get("terminated") is not True
    return Observation(
        text=_text_of(seen, text_field),
        reward=_reward(data.get("reward")),
        terminated=done and not truncated,
        truncated=truncated,
        admissible=_choices(seen),
        facts=_facts(seen),
        accepted=_accepted(seen),
    )


def failure_of(data: Mapping[str, Any]) -> str | None:
    """The error of a step that is answered with an error and no observation, as in JSON-RPC; None: no error."""
    return None if "observation" in data else _error_text(data)


def introduce(tools: Sequence[Tool]) -> str:
    """One line for each tool, for the agent to read: how to call it, and its description."""
    return "\n".join(
        f"{tool.name}[{tool.text_argument or 'JSON object'}]: {' '.join((tool.description or '').split())}"
        for tool in tools
    )


def _call(text: str, tools: Sequence[Tool]) -> dict[str, Any]:
    match = _CALL.fullmatch(text)
    names = ", ".join(tool.name for tool in tools)
    if match is None:
        raise ActionRefused(f"an action must be tool[argument], where the tool is one of {names}")
    tool = next((tool for tool in tools if tool.name == match[1]), None)
    if tool is None:
        raise ActionRefused(f"no tool {match[1]!r}, the tools are {names}")
    arguments = _json_object(match[2])
    if tool.text_argument is not None and (arguments is None or not _fits(arguments, tool.input_schema)):
        arguments = {tool.text_argument: match[2]}
    if arguments is None and not match[2].strip() and not _required(tool.input_schema):
        arguments = {}
    if arguments is None:
        raise ActionRefused(f"the arguments of tool {tool.name} must be a JSON object: {tool.name}[{{…}}]")
    return {"type": "call_tool", "tool_name": tool.name, "arguments": arguments}


def _whole_call(given: dict[str, Any], tools: Sequence[Tool]) -> dict[str, Any]:
    names = ", ".join(tool.name for tool in tools)
    if not isinstance(given.get("tool_name"), str):
        raise ActionRefused(f'a JSON call must be {{"tool_name": …, "arguments": {{…}}}}, with one of {names}')
    return {"type": "call_tool", **given}


def _properties(schema: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The schema of each property. JSON Schema also allows `true`, which accepts anything, for a schema."""
    found = schema.get("properties")
    if not isinstance(found, Mapping):
        return {}
    return {name: of if isinstance(of, Mapping) else {} for name, of in found.items()}


def _required(schema: Mapping[str, Any]) -> list[str]:
    names = schema.get("required")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _content(schema: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The properties that an agent fills in."""
    return {name: of for name, of in _properties(schema).items() if name not in _NOT_CONTENT}


def _fits(given: Mapping[str, Any], schema: Mapping[str, Any]) -> bool:
    """Whether an object has only properties of the schema, and all required ones."""
    return bool(given) and set(_required(schema)) <= given.keys() <= _properties(schema).keys()


def _text_field(schema: Mapping[str, Any]) -> str | None:
    """The only required property, or the only text if nothing is required; None unless that is a text."""
    texts = [name for name, of in _content(schema).items() if of.get("type") == "string"]
    required = [name for name in _required(schema) if name not in _NOT_CONTENT]
    candidates = required or texts
    return candidates[0] if len(candidates) == 1 and candidates[0] in texts else None


def _json_object(text: str) -> dict[str, Any] | None:
    if not text.lstrip().startswith("{"):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _reward(given: object) -> float:
    """The reward; 0 if it is missing. OpenEnv's schema also allows true and false."""
    number = 0 if given is None else int(given) if isinstance(given, bool) else given
    problem = invalid_value(number, {})
    if problem is not None or not isinstance(number, (int, float)):
        raise RequestRejected(f"invalid value: {problem}")
    return float(number)


def _text_of(seen: Mapping[str, Any], text_field: str | None) -> str:
    if text_field is not None:
        return _as_text(seen.get(text_field, ""))
    if isinstance(seen.get("error"), Mapping) and (error := _error_text(seen)):
        return error
    result = seen.get("result")
    if isinstance(result, Mapping) and "data" in result:
        return _as_text(result["data"]) if result["data"] is not None else _parts_of(result)
    texts = {name: value for name, value in seen.items() if isinstance(value, str) and name not in _NOT_CONTENT}
    named = [texts[name] for name in _TEXT_FIELDS if name in texts]
    if named:
        told = next(filter(None, named), "")
        error = _error_text(seen) or ("" if told else texts.get("stderr", ""))
        return "\n".join(filter(None, (told, error)))
    if len(texts) == 1:
        return next(iter(texts.values()))
    rest = {name: value for name, value in seen.items() if name not in _NOT_CONTENT}
    return _as_text(rest or seen.get("metadata") or "")


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def _parts_of(result: Mapping[str, Any]) -> str:
    """The texts of an MCP result that has no structured data."""
    parts = result.get("content")
    return "\n".join(
        str(part["text"])
        for part in (parts if isinstance(parts, list) else ())
        if isinstance(part, Mapping) and "text" in part
    )


def _error_text(seen: Mapping[str, Any]) -> str | None:
    """The text of `error`, which is a text or an object with a `message`; None: no error."""
    error = seen.get("error")
    if isinstance(error, Mapping):
        return str(error.get("message") or error.get("error_type") or error.get("code") or "the call failed")
    return error if isinstance(error, str) and error else None


def _accepted(seen: Mapping[str, Any]) -> bool:
    """Whether the server accepted the action: it reports no error, or one that is not the action's fault."""
    error, result = seen.get("error"), seen.get("result")
    if isinstance(error, Mapping) and error.get("error_type") in _NOT_THE_ACTIONS_FAULT:
        return True
    failed = isinstance(result, Mapping) and result.get("is_error") is True
    return seen.get("accepted") is not False and not failed and _error_text(seen) is None


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
        and (isinstance(value, (bool, int, float)) or (name == "won" and value is not None))
        and name not in _NO_FACTS
    }
    facts = {**scalars, **(told if isinstance(told, Mapping) else {})}
    problem = invalid_value(0.0, facts)
    if problem is not None:
        raise RequestRejected(f"invalid value: {problem}")
    return facts
