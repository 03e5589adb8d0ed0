"""The vocabulary of generated products: `vocabulary.json` as objects."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of product.

    Attributes:
        category: one of the shop's five departments.
        path: the full product category.
        query: the search words to which the shop assigns the kind.
        nouns: names of such a product in titles.
        attributes: possible attributes, in addition to the department's traits.
        options: the options that it can have.
        prices: lowest and highest usual price in dollars.
    """

    category: str
    path: str
    query: str
    nouns: tuple[str, ...]
    attributes: tuple[str, ...]
    options: tuple[Option, ...]
    prices: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Option:
    """An option: its name on the page and all possible values."""

    label: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Kinds of products, traits by department, and the words of titles."""

    kinds: tuple[Kind, ...]
    traits: Mapping[str, tuple[str, ...]]
    makers: tuple[str, ...]
    lines: tuple[str, ...]
    occasions: tuple[str, ...]


def _load(document: Mapping[str, Any]) -> Vocabulary:
    options = {name: Option(entry["label"], tuple(entry["values"])) for name, entry in document["options"].items()}
    return Vocabulary(
        kinds=tuple(_kind(entry, options) for entry in document["kinds"]),
        traits={category: tuple(traits) for category, traits in document["traits"].items()},
        makers=tuple(document["makers"]),
        lines=tuple(document["lines"]),
        occasions=tuple(document["occasions"]),
    )


def _kind(entry: Mapping[str, Any], options: Mapping[str, Option]) -> Kind:
    low, high = entry["prices"]
    return Kind(
        category=entry["category"],
        path=entry["path"],
        query=entry["query"],
        nouns=tuple(entry["nouns"]),
        attributes=tuple(entry["attributes"]),
        options=tuple(options[name] for name in entry["options"]),
        prices=(low, high),
    )


VOCABULARY = _load(json.loads((resources.files(__package__) / "vocabulary.json").read_text(encoding="utf-8")))
