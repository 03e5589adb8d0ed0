"""Turn pydantic's errors into lines for the user: one for each mistake, the key first.

Invariants
- A line shows no more of the input than the one invalid value, shortened. URLs are shown without credentials, secrets
  not at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from services.config.masking import masked
from services.errors import did_you_mean

_LONGEST = 80
_WHOLE, _NUMBER, _SECTION = "must be a whole number", "must be a number", "must be a section (key: value)"
_RULES = {
    "greater_than_equal": "must be >= {ge}",
    "greater_than": "must be > {gt}",
    "less_than_equal": "must be <= {le}",
    "less_than": "must be < {lt}",
    "int_parsing": _WHOLE,
    "int_type": _WHOLE,
    "int_from_float": _WHOLE,
    "int_parsing_size": _WHOLE,
    "float_parsing": _NUMBER,
    "float_type": _NUMBER,
    "finite_number": "must be a finite number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "string_type": "must be text (quote it if it looks like a number)",
    "path_type": "must be a path",
    "model_type": _SECTION,
    "model_attributes_type": _SECTION,
    "tuple_type": "must be a list",
    "too_short": "must have at least {min_length} entries",
    "too_long": "must have at most {max_length} entries",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "must match {pattern}",
}


def lines(error: ValidationError, tree: type[BaseModel]) -> list[str]:
    """Return one line for each mistake, in the order of the tree's fields."""
    return [line for details in error.errors() for line in _lines(details, tree)]


def unknown_key(location: Sequence[str | int], tree: type[BaseModel]) -> str:
    """Return the line for a key that the tree does not have.

    Example: `learner.updatse: unknown key, did you mean learner.updates?`
    """
    *above, name = location
    section = _section_at(tree, above)
    key, prefix = dotted(location), "".join(f"{part}." for part in above)
    siblings = [prefix + field for field in section.model_fields] if section is not None else []
    hint = did_you_mean(key, siblings)
    if not hint:
        same = [known for known in _keys(tree) if known.rpartition(".")[2] == name]
        hint = f", did you mean {' or '.join(same[:3])}?" if same else did_you_mean(key, _keys(tree))
    return f"{key}: unknown key{hint}"


def dotted(location: Sequence[str | int]) -> str:
    """Return a location in the tree as a dotted key."""
    return ".".join(map(str, location))


def shown(key: str, value: object) -> str:
    """Return an invalid value as a message shows it: shortened, credentials masked, null and sections by their kind."""
    if value is None:
        return "null"
    if isinstance(value, Mapping | BaseModel):
        return "a section"
    if isinstance(value, list | tuple | set):
        return "a list"
    if isinstance(value, bool):
        return str(value).lower()
    safe = masked({key: str(value)})[key]
    text = repr(safe) if isinstance(value, str) else safe
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _lines(details: Any, tree: type[BaseModel]) -> Iterator[str]:
    location, kind, context = details["loc"], details["type"], details.get("ctx", {})
    key = dotted(location)
    if kind == "too_short" and len(details["input"]) >= context["min_length"]:
        return  # only because invalid entries were dropped, which have lines of their own
    if kind == "extra_forbidden":
        yield unknown_key(location, tree)
    elif kind == "value_error":
        for line in str(context["error"]).splitlines():
            yield line if not key or line.startswith(key) else f"{key}: {line}"
    elif kind == "literal_error":
        options = re.findall(r"'([^']*)'|(\d+|True|False)", context["expected"])
        names = [text or other.lower() for text, other in options]
        value = details["input"]
        hint = did_you_mean(value, names) if isinstance(value, str) else ""
        yield f"{key}: must be one of {', '.join(names)}, got {shown(str(location[-1]), value)}{hint}"
    elif kind == "choice":
        yield f"{key}: {details['msg']}"
    elif kind == "missing":
        yield f"{key}: missing value"
    else:
        rule = _RULES.get(kind, "").format(**context) or details["msg"]
        value = shown(str(location[-1]) if location else "", details["input"])
        yield f"{key or 'the configuration'}: {rule}, got {value}"


def _section_at(tree: type[BaseModel], location: Sequence[str | int]) -> type[BaseModel] | None:
    section: type[BaseModel] | None = tree
    for part in location:
        if isinstance(part, str) and section is not None:
            field = section.model_fields.get(part)
            section = None if field is None else _section_in(field.annotation)
    return section


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """Return the section in an annotation: the annotation itself, or the first inside an optional or a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _section_in(inner)) is not None), None)


def _keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Return every key of the tree, dotted, without those inside lists, which an override cannot name."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        inner = _section_in(field.annotation)
        if inner is not None and "tuple" not in str(field.annotation):
            keys += _keys(inner, f"{prefix}{name}.")
    return keys
