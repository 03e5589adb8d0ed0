"""The reference of all keys as a Markdown page. `docs/configuration.md` is its output; a test compares the two."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from services.config import recipe_yaml
from services.config.references import REFERENCE_PATTERN
from services.config.tree import Config

_INTRODUCTION = """\
# Configuration

After this page you can change any setting of a run. It is generated: `anchorage config keys > docs/configuration.md`.

- A recipe is a YAML file with the keys below. With `extends: other.yaml` it builds on another recipe, whose values it
  overrides.
- `key=value` on the command line overrides a single key, as in `anchorage train configs/demo.yaml learner.updates=20`.
- `anchorage config show configs/demo.yaml` prints the effective values and the source of each.
- Algorithms set defaults of their own ([algorithms.md](algorithms.md)).
- `null` stands for no value; each key that takes it says what it means.
"""
_WIDTH = 120
_BOUNDS = {"minimum": ">= {}", "exclusiveMinimum": "> {}", "maximum": "<= {}", "exclusiveMaximum": "< {}"}
_TYPES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}


def schema() -> dict[str, Any]:
    """Return the JSON schema of the configuration tree."""
    return Config.model_json_schema()


def page() -> str:
    """Return the reference as Markdown: for each key its type, its default and its meaning."""
    tree = schema()
    return "\n".join([_INTRODUCTION, *_section(tree, tree["$defs"], "", {})]).rstrip() + "\n"


def _section(
    section: Mapping[str, Any], definitions: Mapping[str, Any], prefix: str, described: dict[str, str]
) -> Iterator[str]:
    """Yield the lines of a section: first its own keys, then its subsections.

    `described` maps each model to the heading under which its keys were listed first; later sections refer to it.
    """
    fields = section["properties"]
    inner = {name: found for name, field in fields.items() if (found := _definition(field, definitions)) is not None}
    for name, field in fields.items():
        if name in inner and "description" not in field:
            continue
        yield from _wrapped(f"`{prefix}{name}`: {_type(field, definitions)}; default {_default(field)}.", "- ")
        if "description" in field:
            yield from _wrapped(field["description"], "  ")
    for name, found in inner.items():
        heading = f"{prefix}{name}" + ("[]" if fields[name].get("type") == "array" else "")
        yield f"\n{'##' if not prefix else '###'} `{heading}`\n"
        kind = found["title"]
        if kind in described:
            yield f"Each has the keys of `{described[kind]}`."
            continue
        described[kind] = heading
        yield from _section(found, definitions, f"{heading}.", described)


def _wrapped(text: str, start: str) -> list[str]:
    """Return the text in lines of at most `_WIDTH` characters, all but the first indented."""
    whole = " ".join(text.split())
    return textwrap.wrap(whole, _WIDTH, initial_indent=start, subsequent_indent="  ", break_on_hyphens=False)


def _definition(field: Mapping[str, Any], definitions: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the section that a field or the items of its list hold; None for a plain value."""
    for part in (field, *field.get("anyOf", ()), *field.get("allOf", ()), field.get("items", {})):
        found = definitions.get(str(part.get("$ref", "")).rpartition("/")[2])
        if found is not None and "properties" in found:
            return found  # type: ignore[no-any-return]
    return None


def _type(field: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_type(part, definitions) for part in field["anyOf"])
    if "$ref" in field:
        found = definitions[field["$ref"].rpartition("/")[2]]
        return "section" if "properties" in found else _type(found, definitions)
    for name in ("enum", "examples"):
        if name in field:
            return " | ".join(f"`{recipe_yaml.dump_line('k', value)[3:]}`" for value in field[name])
    if "const" in field:
        return f"`{field['const']}`"
    if field.get("type") == "array":
        items = field.get("prefixItems", [field.get("items", {})])
        return f"list of {_type(items[0], definitions)}"
    if field.get("format") == "path":
        return "path"
    if field.get("pattern") == REFERENCE_PATTERN:
        return "a plug-in as `module:name` or `file.py:name`"
    bounds = [form.format(_number(field[name])) for name, form in _BOUNDS.items() if name in field]
    return " ".join([_TYPES.get(str(field.get("type")), "mapping"), " and ".join(bounds)]).strip()


def _default(field: Mapping[str, Any]) -> str:
    if "default" not in field:
        return "`{}`" if field.get("type") == "object" else "as below"
    return f"`{recipe_yaml.dump_line('k', field['default'])[3:]}`"


def _number(value: float) -> str:
    return f"{int(value):,}" if value == int(value) else repr(value)
