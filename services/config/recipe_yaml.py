"""YAML of recipes and overrides: plain values as in YAML 1.2, and no duplicate keys.

YAML 1.1, which PyYAML implements, reads `off` as false, `010` as 8, `1:30` as 90, and `1e-4` as text.
Here only true and false are booleans, numbers are decimal, and everything else is text.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_PLAIN = (
    ("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        re.compile(
            r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+.0123456789"),
    ),
)


class RecipeError(yaml.YAMLError):
    """The text is invalid as a recipe; the message is one line."""


class _Loader(yaml.SafeLoader):
    """Rejects duplicate keys, and keys that are not text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise RecipeError(f"line {key_node.start_mark.line + 1}: key must be text, got {key!r}")
            if key in seen:
                raise RecipeError(f"line {key_node.start_mark.line + 1}: duplicate key {key!r}")
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` or a YAML 1.1 parser would not read as text."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in _PLAIN:
    _Loader.add_implicit_resolver(_tag, _pattern, _first)
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)


def _whole(loader: yaml.SafeLoader, node: Any) -> int:
    return int(loader.construct_scalar(node))


def _real(loader: yaml.SafeLoader, node: Any) -> float:
    """Python's `float` accepts `inf` and `nan` only without YAML's leading dot."""
    return float(re.sub(r"\.(?=[in])", "", loader.construct_scalar(node).lower()))


_Loader.add_constructor("tag:yaml.org,2002:int", _whole)
_Loader.add_constructor("tag:yaml.org,2002:float", _real)


def load(text: str) -> Any:
    """Return the value of a YAML text; None if it is empty.

    Raises:
        RecipeError: invalid YAML, a duplicate key, or a key that is not text.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecipeError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        raise RecipeError(f"{where}{' '.join(str(error.problem or error.context).split())}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(" ".join(str(error).split())[:200]) from None


def dump(tree: Any) -> str:
    """Return `tree` as text that `load` reads back, keys in their order."""
    text: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False)
    return text


def dump_line(key: str, value: Any) -> str:
    """Return one entry of a mapping as a single line that `load` reads back."""
    text: str = yaml.dump({key: value}, Dumper=_Dumper, sort_keys=False, default_flow_style=True, width=10**9)
    return text.strip()[1:-1]
