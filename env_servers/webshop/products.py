"""Products as the shop sees them: what the pages show and the reward compares, nothing else of the official records.

Invariants
- A product is made from one official record by the rules of the original loader: option names and values are
  lower-cased, `/` in a value becomes ` | `, a missing price is 100 dollars, the first two of more prices count.
- Products are immutable and shared by all sessions; texts that many of them repeat are stored once.
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
    """What somebody wants of a product.

    Attributes:
        text: the wish in words, without a price limit.
        attributes: what the product must have.
        options: values to choose, or None where every combination of the product's options is a goal of its own.
    """

    text: str
    attributes: tuple[str, ...]
    options: tuple[str, ...] | None


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """One product. There is one object a product, so identity is equality.

    Attributes:
        prices: one price in dollars, or the two ends of a range.
        price_tag: the price as pages show it.
        options: values of every option, in the order of the record.
        instruction: the synthetic instruction, where there is one.
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
    """The products of a record list: those with an impossible or repeated asin are left out.

    Args:
        records: official product records, in order.
        attributes: asin -> `attributes`, and `instruction` with `instruction_attributes` where there is one.
        human: asin -> crowd-written instructions.

    Raises:
        BrokenTask: a record lacks a field or holds something unreadable.
    """
    seen: set[str] = set()
    for record in records:
        asin = record.get("asin")
        if not isinstance(asin, str):
            raise BrokenTask("a product record has no asin: the product file is not in WebShop's layout")
        if asin == "nan" or len(asin) > MAX_ASIN_CHARS or asin in seen:
            continue
        seen.add(asin)
        try:
            yield _make(asin, record, attributes.get(asin, {}), human.get(asin, ()))
        except (KeyError, TypeError, AttributeError, IndexError, InvalidOperation) as error:
            raise BrokenTask(f"product {asin} cannot be read ({type(error).__name__}: {error})") from None


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
        human=tuple(_human_instruction(wish) for wish in human),
    )


def _human_instruction(wish: Record) -> Instruction:
    return Instruction(
        wish["instruction"].strip("."), _interned(wish["instruction_attributes"]), tuple(wish["instruction_options"])
    )


def _prices(pricing: str | None) -> tuple[tuple[float, ...], str]:
    """The prices of `"$16.99$26.99"`, and the tag that shows them."""
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
