"""YAML as recipes and overrides mean it: version 1.2's plain values, and no key twice.

YAML 1.1, which PyYAML reads, takes `off` for false, `010` for 8, `1:30` for 90, and `1e-4` for text.
Here true and false are the only booleans, numbers are decimal, and everything else is text.
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
    """The text is not what a recipe may be; the message is one line."""


class _Loader(yaml.SafeLoader):
    """Refuses keys that are there twice, or are no text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise RecipeError(f"line {key_node.start_mark.line + 1}: the key {key!r} is not text")
            if key in seen:
                raise RecipeError(f"line {key_node.start_mark.line + 1}: the key {key!r} is there twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` or any YAML 1.1 reader would take for something else."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in _PLAIN:
    _Loader.add_implicit_resolver(_tag, _pattern, _first)
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)


def _whole(loader: yaml.SafeLoader, node: Any) -> int:
    return int(loader.construct_scalar(node))


def _real(loader: yaml.SafeLoader, node: Any) -> float:
    """Python's float takes `.inf` and `.nan` without the dot."""
    return float(re.sub(r"\.(?=[in])", "", loader.construct_scalar(node).lower()))


_Loader.add_constructor("tag:yaml.org,2002:int", _whole)
_Loader.add_constructor("tag:yaml.org,2002:float", _real)


def load(text: str) -> Any:
    """The value that `text` is; None for an empty one.

    Raises:
        RecipeError: it is not YAML, or a key stands in it twice.
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
    """`tree` as text that `load` reads back; keys in their order."""
    text: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False)
    return text


def dump_line(key: str, value: Any) -> str:
    """One entry of a mapping as a single line that `load` reads back."""
    text: str = yaml.dump({key: value}, Dumper=_Dumper, sort_keys=False, default_flow_style=True, width=10**9)
    return text.strip()[1:-1]
