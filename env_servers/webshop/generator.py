"""Generates a catalogue: seeded, in the layout of the official records, with goals that are achievable but not obvious.

Invariants
- A smaller catalogue is a prefix of a larger one: a product depends only on its number and the products before it.
- About a quarter of the products are near-duplicates of an earlier one: same maker, line and noun, but one different
  attribute, other options and another price. A goal's words thus find several products; attributes tell them apart.
- The product has everything that its instruction asks for.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from env_servers.webshop.products import Product, Record, make_products
from env_servers.webshop.vocabulary import VOCABULARY, Kind

PRODUCTS = 1000

_SEED = "webshop catalogue 1"
_DUPLICATES = 0.25
_WITHOUT_OPTIONS = 0.3
_WITH_RANGE = 0.1
_WITH_INSTRUCTION = 0.45
_ASIN_LETTERS = "0123456789BCDFGHJKLMNPQRSTVWXYZ"
_PRAISE = (
    "Made with {0}, so that you can rely on it day after day.",
    "Our customers love it for being {0}.",
    "{0}: what we promise is what you get.",
    "Designed around {0} and tested for years in our own workshop.",
    "You asked for {0}; here it is, at a fair price.",
    "A thoughtful present for anybody who cares about {0}.",
)


@dataclass(frozen=True, slots=True)
class _Draft:
    """The parts of a product that a near-duplicate keeps or varies."""

    kind: Kind
    maker: str
    line: str
    noun: str
    attributes: tuple[str, ...]


def generate_products(count: int | None = None) -> list[Product]:
    """Return the first `count` products of the generated catalogue; None: `PRODUCTS` of them."""
    rng = random.Random(_SEED)
    notes: dict[str, Record] = {}
    return list(make_products(_records(rng, PRODUCTS if count is None else count, notes), notes, {}))


def _records(rng: random.Random, count: int, notes: dict[str, Record]) -> Iterator[Record]:
    """Yield product records. Before each, its entry of the attributes file is added to `notes`."""
    drafts: list[_Draft] = []
    asins: set[str] = set()
    while len(drafts) < count:
        again = bool(drafts) and rng.random() < _DUPLICATES
        draft = _vary(rng, rng.choice(drafts[-200:])) if again else _draft(rng)
        drafts.append(draft)
        asin = _asin(rng, asins)
        notes[asin] = _note(rng, draft)
        yield _record(rng, draft, asin)


def _draft(rng: random.Random) -> _Draft:
    kind = rng.choice(VOCABULARY.kinds)
    attributes = _pick(rng, kind.attributes, 1, 4) + _pick(rng, VOCABULARY.traits[kind.category], 1, 3)
    return _Draft(
        kind, rng.choice(VOCABULARY.makers), rng.choice(VOCABULARY.lines), rng.choice(kind.nouns), tuple(attributes)
    )


def _vary(rng: random.Random, draft: _Draft) -> _Draft:
    attributes = list(draft.attributes)
    others = [a for a in (*draft.kind.attributes, *VOCABULARY.traits[draft.kind.category]) if a not in attributes]
    attributes[rng.randrange(len(attributes))] = rng.choice(others)
    return replace(draft, attributes=tuple(attributes))


def _asin(rng: random.Random, taken: set[str]) -> str:
    while True:
        asin = "B0" + "".join(rng.choices(_ASIN_LETTERS, k=8))
        if asin not in taken:
            taken.add(asin)
            return asin


def _note(rng: random.Random, draft: _Draft) -> Record:
    note: dict[str, Any] = {"attributes": list(draft.attributes)}
    wanted = _pick(rng, draft.attributes, 1, 4)
    if rng.random() < _WITH_INSTRUCTION:
        before = rng.randint(0, min(2, len(wanted)))
        text = " ".join(["Find me", ", ".join(wanted[:before]), draft.kind.query]).replace("  ", " ")
        if wanted[before:]:
            text += f" {rng.choice(('with', 'for', 'that is'))} {', '.join(wanted[before:])}"
        note |= {"instruction": text, "instruction_attributes": wanted}
    return note


def _record(rng: random.Random, draft: _Draft, asin: str) -> Record:
    kind, shown = draft.kind, [attribute.title() for attribute in draft.attributes]
    rng.shuffle(shown)
    title = [f"{draft.maker} {draft.line} {draft.noun}", *shown[: rng.randint(0, 2)], rng.choice(VOCABULARY.occasions)]
    bullets = [f"{attribute} - {_praise(rng, attribute)} " for attribute in shown]
    about = [_praise(rng, attribute) for attribute in _pick(rng, shown, 0, len(shown))]
    return {
        "asin": asin,
        "name": ", ".join(title),
        "full_description": " ".join([f"The {draft.maker} {draft.line} {draft.noun}.", *about]),
        "small_description": bullets,
        "category": kind.category,
        "product_category": kind.path,
        "query": kind.query,
        "pricing": _pricing(rng, kind),
        "customization_options": _options(rng, kind),
        "images": [],
    }


def _praise(rng: random.Random, attribute: str) -> str:
    text = rng.choice(_PRAISE).format(attribute.lower())
    return text[0].upper() + text[1:]


def _pricing(rng: random.Random, kind: Kind) -> str:
    """Draw a price, log-uniform within the kind's prices, or the two ends of a range."""
    low, high = map(math.log, kind.prices)
    price = math.exp(rng.uniform(low, high))
    tag = f"${price:.2f}"
    return f"{tag}${price * rng.uniform(1.1, 2.5):.2f}" if rng.random() < _WITH_RANGE else tag


def _options(rng: random.Random, kind: Kind) -> dict[str, list[dict[str, str]]]:
    if rng.random() < _WITHOUT_OPTIONS:
        return {}
    chosen = {}
    for option in kind.options:
        chosen[option.label] = [{"value": value} for value in _pick(rng, option.values, 2, 9)]
    return chosen


def _pick(rng: random.Random, things: Sequence[str], least: int, most: int) -> list[str]:
    """Draw between `least` and `most` distinct things, in random order."""
    return rng.sample(things, min(len(things), rng.randint(least, most)))
