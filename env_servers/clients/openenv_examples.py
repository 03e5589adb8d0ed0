"""Random values that match a JSON schema: the actions that a check plays on a server of typed actions.

Covers the schemas that pydantic and FastMCP write. `pattern` is ignored: such a text may not match.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

WORDS = ("look", "help", "yes", "no", "1", "north", "hello")
OPTIONAL_SHARE = 0.3
"""Probability that a property that is not required is given."""
MOST_NESTED = 64
"""Nesting depth at which a schema is given up."""
LONGEST = 4096
"""Largest minimum length of a text or a list that is drawn."""
DEEPEST = 6
"""Nesting depth from which only required properties are given, and lists have their minimum length."""


def example(
    schema: Mapping[str, Any], rng: random.Random, root: Mapping[str, Any] | None = None, depth: int = 0
) -> Any:
    """Draw a value that matches `schema`.

    Args:
        schema: a JSON schema. One that is none may raise anything.
        rng: makes the choices.
        root: the document that references point into; none: `schema` itself.
        depth: nesting depth so far.

    Example: `{"type": "object", "properties": {"n": {"type": "integer", "minimum": 3}}, "required": ["n"]}` gives
    `{"n": 3}`, or another integer from 3 to 13.
    """
    if depth > MOST_NESTED:
        raise ValueError("the schema requires itself")
    root = schema if root is None else root
    schema = _resolved(schema, root)
    if "const" in schema:
        return schema["const"]
    for name in ("enum", "examples"):
        if schema.get(name):
            return rng.choice(schema[name])
    for name in ("anyOf", "oneOf"):
        if options := [option for option in schema.get(name, ()) if option.get("type") != "null"]:
            return example(rng.choice(options), rng, root, depth + 1)
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
    """The schema with its reference and its `allOf` resolved."""
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
    least = _least(schema, "minItems")
    most = min(int(schema.get("maxItems", least + 2)), least + 2) if depth < DEEPEST else least
    items = schema.get("prefixItems")
    if items:
        return [example(of, rng, root, depth + 1) for of in items]
    return [example(schema.get("items") or {}, rng, root, depth + 1) for _ in range(rng.randint(least, most))]


def _bounds(schema: Mapping[str, Any], step: int) -> tuple[int, int]:
    """The smallest and the largest integer to draw, both within the schema's limits."""
    low = schema.get("minimum", schema.get("exclusiveMinimum", -step) + step)
    high = schema.get("maximum", schema.get("exclusiveMaximum", low + 10 + step) - step)
    return int(low), max(int(low), int(high))


def _least(schema: Mapping[str, Any], name: str) -> int:
    least = int(schema.get(name, 0))
    if least > LONGEST:
        raise ValueError(f"{name} is {least}")
    return least


def _text(schema: Mapping[str, Any], rng: random.Random) -> str:
    text = rng.choice(WORDS)
    least = _least(schema, "minLength")
    most = int(schema.get("maxLength", max(least, len(text))))
    return (text * (least // len(text) + 1))[:most]
