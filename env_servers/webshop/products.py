"""Products of the shop: the fields of the official records that the pages show or the reward compares.

Invariants
- A product is built from one official record by the rules of the original loader: option names and values are
  lower-cased, `/` in a value becomes ` | `, a missing price is 100 dollars, and only the first two prices count.
- Products are immutable and shared by all sessions; repeated texts are interned.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from env_servers.environment import BrokenTask

Record = Mapping[str, Any]

MAX_ASIN_CHARS = 10
DEFAULT_PRICE = 100.0
NO_ATTRIBUTES = ("DUMMY_ATTR",)

_NOT_PRICE = re.compile(r"[^\d.]")


@dataclass(frozen=True, slots=True)
class Instruction:
    """What a shopper wants.

    Attributes:
        text: the request in words, without a price limit.
        attributes: required attributes.
        options: values to choose, or None if every combination of the product's options is a separate goal.
    """

    text: str
    attributes: tuple[str, ...]
    options: tuple[str, ...] | None


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """One product. Each product is one object, so products are compared by identity.

    Attributes:
        prices: one price in dollars, or the two ends of a range.
        price_tag: the price as pages show it.
        options: name → values, in the order of the record.
        instruction: the synthetic instruction, or None.
        human: crowd-written instructions.
    """

    asin: str
    title: str
    description: str
    bullets: tuple[str, ...]
    category: str
    query: str
    product_category: str
    prices: tuple[float, ...]
    price_tag: str
    options: Mapping[str, tuple[str, ...]]
    attributes: tuple[str, ...]
    instruction: Instruction | None
    human: tuple[Instruction, ...]


def make_products(
    records: Iterable[Record], attributes: Mapping[str, Record], human: Mapping[str, Sequence[Record]]
) -> Iterator[Product]:
    """Yield the products of the records. Records with an invalid or duplicate asin are skipped.

    Args:
        records: official product records, in order.
        attributes: asin → `attributes`, optionally `instruction` with `instruction_attributes`.
        human: asin → crowd-written instructions.

    Raises:
        BrokenTask: a field of a record is missing or invalid.
    """
    seen: set[str] = set()
    for record in records:
        asin = record.get("asin")
        if not isinstance(asin, str):
            raise BrokenTask("invalid product file, not in WebShop's layout: a record has no asin")
        if asin == "nan" or len(asin) > MAX_ASIN_CHARS or asin in seen:
            continue
        seen.add(asin)
        try:
            yield _make(asin, record, attributes.get(asin, {}), human.get(asin, ()))
        except (KeyError, TypeError, AttributeError, IndexError, InvalidOperation) as error:
            raise BrokenTask(f"invalid record of product {asin}: {type(error).__name__}: {error}") from None


def _make(asin: str, record: Record, notes: Record, human: Sequence[Record]) -> Product:
    bullets = record["small_description"]
    prices, price_tag = _prices(record.get("pricing"))
    text = notes.get("instruction")
    return Product(
        asin=asin,
        title=record["name"],
        description=record["full_description"] or "",
        bullets=tuple(str(bullet) for bullet in (bullets if isinstance(bullets, list) else [bullets])),
        category=sys.intern(record["category"]),
        query=sys.intern(record["query"].lower().strip()),
        product_category=sys.intern(record["product_category"]),
        prices=prices,
        price_tag=price_tag,
        options=_options(record["customization_options"]),
        attributes=_interned(notes["attributes"]) if "attributes" in notes else NO_ATTRIBUTES,
        instruction=Instruction(text, _interned(notes["instruction_attributes"]), None) if text is not None else None,
        human=tuple(_human_instruction(written) for written in human),
    )


def _human_instruction(written: Record) -> Instruction:
    return Instruction(
        written["instruction"].strip("."),
        _interned(written["instruction_attributes"]),
        tuple(written["instruction_options"]),
    )


def _prices(pricing: str | None) -> tuple[tuple[float, ...], str]:
    """Parse prices: `"$16.99$26.99"` gives (16.99, 26.99) and the tag `$16.99 to $26.99`."""
    if not pricing:
        return (DEFAULT_PRICE,), f"${DEFAULT_PRICE}"
    prices = tuple(float(Decimal(_NOT_PRICE.sub("", part))) for part in pricing.split("$")[1:])
    if len(prices) == 1:
        return prices, f"${prices[0]}"
    return prices[:2], f"${prices[0]} to ${prices[1]}"


def _options(choices: Mapping[str, Sequence[Record] | None] | str | None) -> dict[str, tuple[str, ...]]:
    if not choices or isinstance(choices, str):
        return {}
    return {
        sys.intern(name.lower()): tuple(
            sys.intern(content["value"].strip().replace("/", " | ").lower()) for content in contents
        )
        for name, contents in choices.items()
        if contents is not None
    }


def _interned(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(sys.intern(text) for text in texts)
