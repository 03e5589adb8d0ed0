"""Values that fit a JSON schema, drawn by chance: what a check plays on a server of typed actions.

As far as pydantic and FastMCP write schemas. A `pattern` is not looked at: such a text may not fit.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

WORDS = ("look", "help", "yes", "no", "1", "north", "hello")
OPTIONAL_SHARE = 0.3
"""How often a property that is not required is given."""
DEEPEST = 6
"""Below it only what is required is given, and lists are as short as they may be."""


def example(
    schema: Mapping[str, Any], rng: random.Random, root: Mapping[str, Any] | None = None, depth: int = 0
) -> Any:
    """A value that fits `schema`; `root`: the document that its references are in."""
    root = schema if root is None else root
    schema = _resolved(schema, root)
    if "const" in schema:
        return schema["const"]
    for name in ("enum", "examples"):
        if schema.get(name):
            return rng.choice(schema[name])
    for name in ("anyOf", "oneOf"):
        if options := [option for option in schema.get(name, ()) if option.get("type") != "null"]:
            return example(rng.choice(options), rng, root, depth)
    match _kind(schema):
        case "object":
            return _object(schema, rng, root, depth)
        case "array":
            return _array(schema, rng, root, depth)
        case "integer":
            return rng.randint(*_bounds(schema, 1))
        case "number":
            return float(rng.randint(*_bounds(schema, 1)))
        case "boolean":
            return rng.random() < 0.5
        case "null":
            return None
        case _:
            return _text(schema, rng)


def _resolved(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema with its reference and its `allOf` put in."""
    for _ in range(DEEPEST):
        reference = schema.get("$ref")
        parts = schema.get("allOf", ())
        if not isinstance(reference, str) and not parts:
            break
        rest = {name: value for name, value in schema.items() if name not in ("$ref", "allOf")}
        found: Any = root if reference else {}
        for name in reference.removeprefix("#/").split("/") if isinstance(reference, str) else ():
            found = found.get(name, {}) if isinstance(found, Mapping) else {}
        merged: dict[str, Any] = {}
        for part in (found, *parts, rest):
            merged |= part
        schema = merged
    return schema


def _kind(schema: Mapping[str, Any]) -> str:
    kind = schema.get("type")
    if isinstance(kind, list):
        return next((name for name in kind if name != "null"), "null")
    return str(kind) if kind else "object" if "properties" in schema else "string"


def _object(schema: Mapping[str, Any], rng: random.Random, root: Mapping[str, Any], depth: int) -> dict[str, Any]:
    required = schema.get("required", ())
    return {
        name: example(of, rng, root, depth + 1)
        for name, of in schema.get("properties", {}).items()
        if name in required or (depth < DEEPEST and rng.random() < OPTIONAL_SHARE)
    }


def _array(schema: Mapping[str, Any], rng: random.Random, root: Mapping[str, Any], depth: int) -> list[Any]:
    least = int(schema.get("minItems", 0))
    most = min(int(schema.get("maxItems", least + 2)), least + 2) if depth < DEEPEST else least
    items = schema.get("prefixItems")
    if items:
        return [example(of, rng, root, depth + 1) for of in items]
    return [example(schema.get("items") or {}, rng, root, depth + 1) for _ in range(rng.randint(least, most))]


def _bounds(schema: Mapping[str, Any], step: int) -> tuple[int, int]:
    """Whole numbers that are within the schema's limits, both included."""
    low = schema.get("minimum", schema.get("exclusiveMinimum", -step) + step)
    high = schema.get("maximum", schema.get("exclusiveMaximum", low + 10 + step) - step)
    return int(low), max(int(low), int(high))


def _text(schema: Mapping[str, Any], rng: random.Random) -> str:
    text = rng.choice(WORDS)
    least = int(schema.get("minLength", 0))
    most = int(schema.get("maxLength", max(least, len(text))))
    return (text * (least // len(text) + 1))[:most]
