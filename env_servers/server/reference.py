"""`python -m env_servers.server.reference [FILE]`: writes the reference of the HTTP API as Markdown.

The source is the OpenAPI document of a server with every feature on.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from env_servers.environment import Environment, Observation
from env_servers.server.app import create_app
from env_servers.server.settings import ServerSettings

HEAD = """\
# Environment servers: HTTP API

This page lists every route, request and result of an environment server; [environments.md](environments.md) explains
them. It is generated from the OpenAPI document that every server has at `/openapi.json`, by
`python -m env_servers.server.reference docs/env-api.md`.

All bodies are JSON. If the server has a token, every request except `/health` must send it:
`Authorization: Bearer …`. Every error is a problem document (RFC 9457, `application/problem+json`, schema `Problem`).

OpenEnv's clients play over the WebSocket `/ws`; `/schema` returns the schemas of its messages. AgentGym's routes are
shown as for ALFWorld; a WebShop server calls an environment `env_idx`, as AgentGym's WebShop client does.
"""


class _Example(Environment):
    """An environment for the routes to serve."""

    name = "example"

    @classmethod
    def splits(cls) -> Mapping[str, int]:
        return {"train": 1}

    def reset(self, split: str, index: int, *, expert: bool = False) -> Observation:
        raise NotImplementedError

    def step(self, action: str) -> Observation:
        raise NotImplementedError


def reference() -> str:
    """The whole page, as Markdown."""
    document = create_app(_Example, ServerSettings(token=SecretStr("shown nowhere"), workers=2)).openapi()
    parts = [HEAD, "## Routes\n", *_routes(document["paths"]), "## Schemas\n"]
    for name, schema in sorted(document["components"]["schemas"].items()):
        parts.extend(_schema(name, schema))
    return "\n".join(parts).rstrip() + "\n"


def _routes(paths: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for path, methods in paths.items():
        for method, operation in methods.items():
            yield f"### `{method.upper()} {path}`\n"
            yield f"{operation.get('description', '')}\n"
            rows = []
            for parameter in operation.get("parameters", []):
                rows.append(f"query `{parameter['name']}`: {_type(parameter['schema'])}")
            if "requestBody" in operation:
                rows.append(f"body: {_content(operation['requestBody'])}")
            rows += [f"{status}: {_content(answer)}" for status, answer in _answers(operation)]
            problems = [status for status in operation["responses"] if status >= "400"]
            if problems:
                rows.append(f"problems: {', '.join(problems)}")
            yield "\n".join(f"- {row}" for row in rows) + "\n"


def _answers(operation: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(status, answer) for status, answer in operation["responses"].items() if status < "400"]


def _content(holder: Mapping[str, Any]) -> str:
    contents = holder.get("content", {})
    if not contents:
        return "no body"
    media_type, content = next(iter(contents.items()))
    return _type(content.get("schema", {})) if media_type == "application/json" else f"`{media_type}`"


def _schema(name: str, schema: Mapping[str, Any]) -> Iterator[str]:
    yield f"### {name}\n"
    if schema.get("description"):
        yield f"{schema['description']}\n"
    properties = schema.get("properties", {})
    if not properties:
        yield f"{_type(schema)}\n"
        return
    required = schema.get("required", [])
    rows = ["| field | type | |", "| --- | --- | --- |"]
    for field, described in properties.items():
        note = described.get("description", "")
        if field not in required:
            note = f"{note} Default {_default(described)}.".strip()
        rows.append(f"| `{field}` | {_type(described)} | {note} |")
    yield "\n".join(rows) + "\n"


def _default(described: Mapping[str, Any]) -> str:
    if "default" not in described:
        return "empty"
    return f"`{described['default']}`" if described["default"] not in ("", None) else "none"


def _type(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return " or ".join(dict.fromkeys(_type(one) for one in schema[several]))
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    match schema.get("type"):
        case "array" if "prefixItems" in schema:
            return f"[{', '.join(_type(one) for one in schema['prefixItems'])}]"
        case "array":
            return f"list of {_type(schema.get('items', {}))}"
        case "object" if isinstance(schema.get("additionalProperties"), dict) and schema["additionalProperties"]:
            return f"object of {_type(schema['additionalProperties'])}"
        case str() as kind:
            return kind + _limits(schema)
        case _:
            return "anything"


def _limits(schema: Mapping[str, Any]) -> str:
    words = {
        "minimum": "≥ {}",
        "exclusiveMinimum": "> {}",
        "maximum": "≤ {}",
        "exclusiveMaximum": "< {}",
        "maxLength": "at most {} characters",
        "minItems": "at least {}",
        "maxItems": "at most {}",
    }
    found = [words[key].format(schema[key]) for key in words if key in schema]
    return f" ({', '.join(found)})" if found else ""


def main(arguments: Sequence[str]) -> int:
    """Write the page to the file that is named, or to standard output; returns the exit code."""
    if len(arguments) > 1:
        sys.stderr.write("usage: python -m env_servers.server.reference [FILE]\n")
        return 2
    if arguments:
        Path(arguments[0]).write_text(reference())
    else:
        sys.stdout.write(reference())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
